"""The real model and the real passages folder through the build and back."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.memory import build, codec_error, encoding, lookup
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.memory.manifest import EncodeProgram, Identity, Layout
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from tests.models import tiny

P, K = 16, 3


@pytest.fixture(scope="module")
def model():
    t5 = dataclasses.replace(tiny.T5, vocab_size=64)
    return GlimmerModel(GlimmerConfig(t5, memory_layers=2, rerank_layers=1))


@pytest.fixture(scope="module")
def params(model):
    shapes = {
        "question_tokens": (1, 4),
        "passage_tokens": (1, K, P),
        "decoder_input_tokens": (1, 4),
        "decoder_target_tokens": (1, 4),
        "decoder_loss_weights": (1, 4),
    }
    # Shapes only: running the initialisers costs more than the test.
    tree = jax.eval_shape(
        lambda key: model.get_initial_variables(key, shapes)["params"], jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), tree)


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    path = tmp_path_factory.mktemp("passages") / "p"
    records = [
        {"id": 100 + i, "title": f"t{i}", "text": "word " * (1 + 5 * i % 7)} for i in range(9)
    ]
    write_passages(
        path,
        records,
        lambda text: [2 + ord(c) % 60 for c in text[::4]],
        "sha256:vocabulary",
        P,
        vocab_size=64,
    )
    return Passages.open(path)


def _encoder(model, params, passages, mesh):
    return MemoryEncoder(
        encoding.bind_encoder(model.memory_states, params, mesh, model.config.memory_codec),
        Identity(
            encoder_fingerprint=encoder_fingerprint(params, model.config),
            vocabulary_fingerprint=passages.fingerprint,
            codec=model.config.memory_codec,
            emb_dim=model.config.t5.emb_dim,
            max_length=P,
        ),
        EncodeProgram(K, (P,), "float32", None, "cpu", jax.__version__),
        mesh.size,
    )


def test_bytes_of_the_model_do_not_depend_on_the_mesh(
    model, params, passages, tmp_path, folder_bytes
):
    _, names = model.abstract_variables()
    for name, sizes in {"one": dict(data=1), "many": dict(data=2, fsdp=2, model=2)}.items():
        count = math.prod(sizes.values())
        mesh = partitioning.make_mesh(partitioning.MeshConfig(**sizes), jax.devices()[:count])
        placed = jax.device_put(params, partitioning.shardings(names, mesh))
        encoder = _encoder(model, placed, passages, mesh)
        build.build_memory(
            encoder,
            passages,
            tmp_path / name,
            passages_fingerprint="sha256:p",
            config=build.BuildConfig(Layout(4, 64)),
        )
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


def test_the_reference_is_float32_throughout(model, params):
    t5 = dataclasses.replace(model.config.t5, dtype="bfloat16", matmul_dtype="bfloat16")
    coarse = GlimmerModel(dataclasses.replace(model.config, t5=t5))
    exact = jax.jit(codec_error.exact_states(coarse))
    text = exact.lower(params, np.ones((2, P), np.int32)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and "bf16" not in text
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_memory_from_the_store_equals_memory_computed_now(model, params, passages, tmp_path):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])
    fingerprint = encoder_fingerprint(params, model.config)
    build.build_memory(
        _encoder(model, params, passages, mesh),
        passages,
        tmp_path / "m",
        passages_fingerprint="sha256:p",
        config=build.BuildConfig(Layout(K, 64)),
    )
    store = MemoryStore.open(tmp_path / "m", fingerprint, passages.fingerprint)
    ids = passages.ids[[[4, -1, 2], [0, 8, 7]]]
    ids[0, 1] = -1
    memory, lengths = lookup.DiskLookup(store, P)(store.rows(ids))

    tokens = passages.tokens(passages.rows(ids), P)
    np.testing.assert_array_equal(lengths, (tokens > 0).sum(-1))
    # The same program: K rows, one bucket, and rows that do not depend on their neighbours.
    encode = jax.jit(functools.partial(model.encode_memory, params))
    real = tokens > 0
    for tokens_KP, stored, real_KP in zip(tokens, memory["states"], real, strict=True):
        fresh = np.asarray(encode(tokens_KP)["states"])
        np.testing.assert_array_equal(fresh[real_KP], stored[real_KP])

    batch = {
        "question_tokens": np.array([[0, 5, 6, 7], [3, 4, 5, 6]], np.int32),
        "decoder_input_tokens": np.array([[0, 5, 6, 7]] * 2, np.int32),
        "decoder_target_tokens": np.array([[5, 6, 7, 1]] * 2, np.int32),
        "decoder_loss_weights": np.ones((2, 4), np.float32),
    }
    score = jax.jit(model.score_batch)
    from_tokens = score(params, {**batch, "passage_tokens": tokens})
    from_store = score(
        params, {**batch, "passage_memory": memory, "passage_lengths": jnp.asarray(lengths)}
    )
    np.testing.assert_allclose(from_tokens, from_store, rtol=1e-5)
