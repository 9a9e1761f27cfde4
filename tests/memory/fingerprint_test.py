"""The encoder's fingerprint: the same where memory is the same, and only there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.memory import fingerprint
from glimmer_jax.models.glimmer import GlimmerConfig
from tests.models import tiny

CONFIG = GlimmerConfig(
    dataclasses.replace(tiny.T5, vocab_size=16, emb_dim=8, num_heads=2, num_encoder_layers=12),
    memory_layers=12,
)


def encoder_fingerprint(params, **t5):
    config = dataclasses.replace(CONFIG, t5=dataclasses.replace(CONFIG.t5, **t5))
    return fingerprint.encoder_fingerprint(params, config)


def _params(layers=12, seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "token_embedder": {"embedding": array(16, 8)},
        "memory_encoder": {
            "relpos_bias": {"rel_embedding": array(2, 32)},
            "layers": {"mlp": {"wi_0": {"kernel": array(layers, 8, 16)}}, "norm": array(layers, 8)},
        },
        "decoder": {"kernel": array(8, 8)},
    }


def _looped(params):
    encoder = params["memory_encoder"]
    loops = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], encoder["layers"]) for i in range(12)}
    return {**params, "memory_encoder": {"relpos_bias": encoder["relpos_bias"], **loops}}


def test_scanned_looped_and_sharded_are_one_encoder():
    params = _params()
    expected = encoder_fingerprint(params)
    assert expected.startswith("sha256:") and len(expected) == 71
    assert encoder_fingerprint(_looped(params)) == expected
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=4))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    kernel = params["memory_encoder"]["layers"]["mlp"]["wi_0"]
    kernel["kernel"] = jax.device_put(kernel["kernel"], spread)
    assert encoder_fingerprint(params) == expected


def test_only_what_memory_depends_on_counts():
    params = _params()
    expected = encoder_fingerprint(params)
    assert encoder_fingerprint({**params, "decoder": {}, "live_encoder": {}}) == expected
    frozen = {**params, "memory_embedder": params["token_embedder"], "token_embedder": None}
    assert encoder_fingerprint(frozen) == expected
    for change in (
        lambda p: p["token_embedder"]["embedding"].__setitem__((0, 0), 9.0),
        lambda p: p["memory_encoder"]["relpos_bias"]["rel_embedding"].__setitem__((1, 3), 9.0),
        lambda p: p["memory_encoder"]["layers"]["norm"].__setitem__((11, 0), 9.0),
    ):
        other = _params()
        change(other)
        assert encoder_fingerprint(other) != expected


def test_settings_count_where_they_change_the_function():
    params = _params()
    expected = encoder_fingerprint(params)
    assert encoder_fingerprint(params, mlp_activations=("relu", "linear")) != expected
    assert encoder_fingerprint(params, relpos_max_distance=64) != expected
    assert encoder_fingerprint(params, scan_layers=False, dropout_rate=0.1) == expected


def test_dtype_counts():
    params = _params()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    assert encoder_fingerprint(half) != encoder_fingerprint(params)


def test_model_without_memory_is_rejected():
    with pytest.raises(ValueError, match="'memory_encoder'; these have .*FiD"):
        encoder_fingerprint({"token_embedder": {"embedding": np.zeros((2, 2))}})


def test_a_table_shared_with_the_live_layers_counts():
    def params(table):
        return {
            "token_embedder": {"embedding": np.ones((8, 4), np.float32)},
            "memory_encoder": {"layers_0": {"kernel": np.ones((4, 4), np.float32)}},
            "live_encoder": {"relpos_bias": {"rel_embedding": np.full((1, 32), table, np.float32)}},
        }

    assert encoder_fingerprint(params(0)) == encoder_fingerprint(params(0))
    assert encoder_fingerprint(params(0)) != encoder_fingerprint(params(1))


def test_parameters_spread_over_hosts_are_gathered(monkeypatch):
    gathered = []
    monkeypatch.setattr(
        fingerprint, "_on_host", lambda leaf: gathered.append(leaf.shape) or np.asarray(leaf)
    )
    params = _params()
    encoder_fingerprint(params)
    wanted = jax.tree.leaves([params["token_embedder"], params["memory_encoder"]])
    assert sorted(gathered) == sorted(leaf.shape for leaf in wanted)


def test_passages_are_known_by_ids_and_tokens():
    files = {name: {"sha256": name} for name in ("ids.npy", "offsets.npy", "tokens.npy", "x")}
    expected = fingerprint.passages_fingerprint({"files": files})
    assert expected.startswith("sha256:") and len(expected) == 71
    other = {**files, "x": {"sha256": "changed"}}
    assert fingerprint.passages_fingerprint({"files": other}) == expected
    other = {**files, "tokens.npy": {"sha256": "changed"}}
    assert fingerprint.passages_fingerprint({"files": other}) != expected
