"""Codebooks: learnt on a mesh, and carried by the model through store, lookup and training."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import codecs, partitioning
from glimmer_jax.memory import codebooks, encoding, lookup
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.models import tiny

SMALL = dataclasses.replace(codecs.get("pq"), bits=4)
T5 = dataclasses.replace(tiny.T5, vocab_size=64)
PQ = GlimmerConfig(T5, memory_layers=2, rerank_layers=1, memory_codec="pq")


def _mesh(devices):
    config = partitioning.MeshConfig(data=devices)
    return partitioning.make_mesh(config, jax.devices()[:devices])


def _correlated(rows=3000, emb_dim=16):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(emb_dim, emb_dim)) * np.geomspace(3, 0.1, emb_dim)[:, None]
    return (rng.normal(size=(rows, emb_dim)) @ mixing + 1).astype(np.float32)


def test_learned_codebooks_equal_lloyds_on_every_mesh():
    states = _correlated(500)
    books = codebooks.learn(SMALL, states, _mesh(1), iterations=4)
    assert {k: v.shape for k, v in books.items()} == SMALL.codebook_specs(16)
    turned = ((states - books["mean"]) / books["scale"]) @ books["basis"]
    points = turned.reshape(500, 2, 8).swapaxes(0, 1)
    drawn = points[:, np.random.default_rng(0).permutation(500)]
    keys = jax.random.split(jax.random.key(0), 2)
    spare = drawn[:, :16]
    for group in range(2):
        centroids = np.asarray(codebooks.plus_plus(drawn[group], keys[group], 16))
        for step in range(4):
            far = np.square(points[group][:, None] - centroids).sum(-1)
            near = far.argmin(1)
            centroids = np.stack(
                [
                    points[group][near == c].mean(0)
                    if (near == c).any()
                    else spare[group][(c - step) % 16]
                    for c in range(16)
                ]
            )
        np.testing.assert_allclose(books["centroids"][group], centroids, rtol=1e-3, atol=1e-3)
        near = np.square(points[group][:, None] - centroids).sum(-1).argmin(1)
        shares = np.bincount(near, minlength=16) / 500
        np.testing.assert_allclose(books["frequencies"][group], shares, atol=1e-6)
    many = codebooks.learn(SMALL, states, _mesh(8), iterations=4)
    for name, value in books.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-3, atol=1e-3)


def test_initial_centroids_are_far_apart():
    """k-means++ finds nearly all of 16 distant clusters of unequal size; a uniform draw does not."""
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.arange(16), np.arange(16) * 8 + 1)
    points = (rng.normal(size=(16, 4)) * 100)[sizes] + rng.normal(size=(len(sizes), 4))
    points = rng.permutation(points).astype(np.float32)

    def far(centroids):
        return np.square(points[:, None] - centroids).sum(-1).min(1).mean()

    starts = [np.asarray(codebooks.plus_plus(points, jax.random.key(n), 16)) for n in range(8)]
    assert all((start[:, None] == points).all(-1).any(1).all() for start in starts)
    uniform = np.mean([far(rng.permutation(points)[:16]) for _ in range(8)])
    assert np.mean([far(start) for start in starts]) < 0.2 * uniform
    # Fewer different points than codes are no error.
    assert np.isfinite(codebooks.plus_plus(points[:3], jax.random.key(0), 16)).all()


def test_the_basis_is_orthogonal_and_balances_subspace_variance():
    covariance = np.cov(_correlated().T)
    basis = codebooks.even_basis(covariance, 8).astype(np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-5)
    turned = np.linalg.slogdet((basis.T @ covariance @ basis)[:8, :8])[1]
    rest = np.linalg.slogdet((basis.T @ covariance @ basis)[8:, 8:])[1]
    assert abs(turned - rest) < 1.5
    assert abs(turned + rest - np.linalg.slogdet(covariance)[1]) < 1e-3


@pytest.mark.parametrize("outliers", [0, 1, 4])
def test_outlier_channels_cost_the_others_nothing(outliers):
    states = _correlated()
    errors = {}
    for size in (1, 100):
        loud = states.copy()
        loud[:, 5 : 5 + outliers] *= size
        books = codebooks.learn(SMALL, loud, _mesh(1), iterations=4)
        kept = jax.jit(lambda x, b: SMALL.decode(SMALL.encode(x, b), jnp.float32, b))(loud, books)
        others = np.delete(np.arange(16), np.arange(5, 5 + outliers))
        errors[size] = np.sqrt(np.square(np.asarray(kept) - loud)[:, others].mean())
    assert errors[100] == pytest.approx(errors[1], rel=0.05)
    assert errors[1] < 0.75 * states.std()


def test_unsuitable_samples_are_rejected():
    with pytest.raises(ValueError, match="16 codes .*9.*SAMPLE_TOKENS"):
        codebooks.learn(SMALL, np.zeros((9, 16), np.float32), _mesh(1))
    with pytest.raises(ValueError, match="NaN or infinity for passages of the sample"):
        codebooks.learn(SMALL, np.full((20, 16), np.nan, np.float32), _mesh(1))
    # A corpus that says one thing only is learnt all the same.
    books = codebooks.learn(SMALL, np.ones((20, 16), np.float32), _mesh(1))
    assert codebooks.relative_error(SMALL, books, np.ones((3, 16), np.float32)) < 1e-6


def test_a_sample_is_of_real_tokens(tiny):
    passages = tiny.TinyPassages()
    settings = dict(rows=4, buckets=(4, 8, 12), devices=2)
    every = codebooks.sample_states(tiny.encode_states, passages, tokens=10**6, **settings)
    assert every.shape == (passages.lengths(range(23)).sum(), 8)
    some = codebooks.sample_states(tiny.encode_states, passages, tokens=30, **settings)
    assert some.shape == (30, 8)
    # Passages in the order of the draw, not by length: a part of the sample is a sample.
    drawn = np.random.default_rng(0).permutation(23)
    whole = [np.asarray(tiny.encode_states(passages.tokens([row], 12)))[0] for row in drawn]
    sizes = passages.lengths(drawn)
    wanted = np.concatenate([one[:size] for one, size in zip(whole, sizes, strict=True)])
    np.testing.assert_allclose(every, wanted, rtol=1e-5, atol=1e-5)


def test_a_sample_is_held_once_beside_what_the_devices_hold(monkeypatch, tiny):
    monkeypatch.setattr(codebooks, "_ROWS", 1024)
    states = np.random.default_rng(0).normal(size=(200_000, 32)).astype(np.float32)

    def peak(function):
        tracemalloc.start()
        result = function()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most / states.nbytes, result

    # CPU devices: their part is numpy's too.
    learnt, books = peak(lambda: codebooks.learn(SMALL, states, _mesh(4), iterations=1))
    assert learnt < 1.6
    tried, lost = peak(lambda: codebooks.relative_error(SMALL, books, states))
    assert tried < 0.6 and 0 < lost < 1

    passages = tiny.TinyPassages(count=6)
    passages.all_tokens = [np.arange(2, 14, dtype=np.int32)] * 6
    wide = np.zeros((1, 12, 400_000), np.float32)
    sampled, sample = peak(
        lambda: codebooks.sample_states(
            lambda tokens: wide, passages, tokens=72, rows=1, buckets=(12,), devices=1
        )
    )
    # The sample, and one call's states twice while they are picked from.
    assert sampled * states.nbytes < sample.nbytes + 3 * wide.nbytes


def test_infinities_of_both_signs_are_rejected_without_a_warning():
    states = np.ones((20, 16), np.float32)
    states[3, 2], states[4, 2] = np.inf, -np.inf
    with pytest.raises(ValueError, match="NaN or infinity for passages of the sample"):
        codebooks.learn(SMALL, states, _mesh(2))


def _books(codec, emb_dim):
    rng = np.random.default_rng(3)
    specs = codec.codebook_specs(emb_dim)
    books = {name: rng.normal(size=shape).astype(np.float32) for name, shape in specs.items()}
    return {**books, "basis": np.eye(emb_dim, dtype=np.float32), "scale": np.ones(emb_dim, "f")}


def test_pq_memory_goes_the_ways_of_all_memory(tiny, tmp_path):
    books = _books(codecs.get("pq"), tiny.EMB_DIM)

    def encode(tokens):
        return encoding.encode_states("pq", tiny.encode_states(tokens), books)

    report = tiny.build_tiny(tmp_path / "s", encode=jax.jit(encode), codec="pq", codebooks=books)
    assert 0 < report.manifest.codec_error["relative_rms"] < 1
    store = MemoryStore.open(tmp_path / "s")
    rows = np.array([[0, 22, -1], [7, 7, 3]])
    disk, lengths = lookup.DiskLookup(store, 12)(rows)
    mesh, _ = lookup.MeshLookup(store, _mesh(4), 12, page_tokens=4)(rows)
    assert disk["codes"].shape == (2, 3, 12, 1) and disk["codes"].dtype == np.uint8
    np.testing.assert_array_equal(mesh["codes"], disk["codes"])
    tokens = tiny.TinyPassages().tokens([22], 12)
    wanted = np.asarray(jax.jit(encode)(tokens)[0]["codes"])[0, : lengths[0, 1]]
    np.testing.assert_array_equal(disk["codes"][0, 1, : lengths[0, 1]], wanted)


def _params(config):
    model = GlimmerModel(config)
    shapes, _ = model.abstract_variables()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    if "memory_codebooks" in params:
        params["memory_codebooks"] = _books(codecs.get("pq"), 16)
    return model, params


def _batch(model, params):
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, 60, (2, 3, 5)).astype(np.int32)
    batch = {
        "question_tokens": rng.integers(2, 60, (2, 4)).astype(np.int32),
        "decoder_input_tokens": np.ones((2, 3), np.int32),
        "decoder_target_tokens": np.ones((2, 3), np.int32),
        "decoder_loss_weights": np.ones((2, 3), np.float32),
    }
    memory = jax.jit(model.encode_memory)(params, tokens.reshape(6, 5))
    memory = {name: x.reshape(2, 3, *x.shape[1:]) for name, x in memory.items()}
    stored = {"passage_memory": memory, "passage_lengths": np.full((2, 3), 5)}
    return {**batch, "passage_tokens": tokens}, {**batch, **stored}


def test_the_model_reads_codes_as_it_reads_tokens():
    model, params = _params(PQ)
    from_tokens, from_store = _batch(model, params)
    score = jax.jit(model.score_batch)
    np.testing.assert_allclose(score(params, from_tokens), score(params, from_store), rtol=1e-5)
    assert from_store["passage_memory"]["codes"].shape == (2, 3, 5, 2)


@pytest.mark.parametrize("train", [False, True])
def test_only_centroids_and_their_frequencies_follow_and_only_if_enabled(train):
    model, params = _params(dataclasses.replace(PQ, train_codebooks=train))
    batch = {"passage_tokens": np.arange(2, 17, dtype=np.int32).reshape(1, 3, 5)}

    def loss(params):
        states, _ = model.module.apply({"params": params}, batch, method="passage_states")
        return jnp.sum(states * jnp.arange(16.0).reshape(1, 1, 1, 16))

    grads = jax.jit(jax.grad(loss))(params)
    assert np.asarray(grads["token_embedder"]["embedding"]).any()
    moved = {name for name, g in grads["memory_codebooks"].items() if np.asarray(g).any()}
    assert moved == ({"centroids", "frequencies"} if train else set())
    _, names = model.abstract_variables()
    optimizer = make_optimizer(OptimizerConfig(), names, model.frozen(params))
    trained, frozen = optimizer.split(params)
    assert ("memory_codebooks" in trained) == train and "basis" in frozen["memory_codebooks"]
    assert optimizer.init(params)
    # Under a mesh, as training starts.
    with jax.set_mesh(_mesh(2)):
        assert model.abstract_variables()[1] == names


def test_codebooks_belong_to_the_encoders_fingerprint():
    _, params = _params(PQ)
    other = {**params, "memory_codebooks": {**params["memory_codebooks"], "mean": np.ones(16, "f")}}
    plain = dataclasses.replace(PQ, memory_codec="bf16")
    assert encoder_fingerprint(params, PQ) != encoder_fingerprint(other, PQ)
    assert encoder_fingerprint(params, plain) == encoder_fingerprint(other, plain)


def test_codebooks_go_with_their_layer_and_codec_only():
    _, params = _params(PQ)
    plain = dataclasses.replace(PQ, memory_codec="bf16")
    assert "memory_codebooks" not in recut(params, PQ, plain)
    kept_one = dataclasses.replace(PQ, num_kept=1, freeze_memory=True)
    assert "memory_codebooks" in recut(params, PQ, kept_one)
    without = recut(params, PQ, plain)
    for target in (PQ, dataclasses.replace(PQ, memory_layers=1)):
        with pytest.raises(
            ValueError, match="MEMORY_CODEC.*after layer .*none.*run_mode=codebooks"
        ):
            recut(without, plain, target)
    with pytest.raises(ValueError, match="'pq' after layer 2"):
        recut(params, PQ, dataclasses.replace(PQ, memory_layers=1))
    with pytest.raises(ValueError, match="train_codebooks.*bf16.*train_codebooks=False"):
        dataclasses.replace(plain, train_codebooks=True)
