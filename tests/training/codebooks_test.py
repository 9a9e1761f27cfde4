"""Codebooks as moving averages: against numpy, over microbatches and meshes, beside the optimiser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import codecs
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.training.codebooks import follow
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import state_from_params, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step
from tests.models import tiny
from tests.training.train_glimmer_test import batch_at, fresh_params

CODES, CHANNELS = 6, 3
CODEC = codecs.ProductQuantisation("small", channels=CHANNELS, bits=3)
PLAIN = {"basis": jnp.eye(CHANNELS), "scale": jnp.ones(CHANNELS), "mean": jnp.zeros(CHANNELS)}


def assignments(books, tokens, counted=None):
    """What the backward pass of `straight_through` gives for these tokens `[N, S]`."""
    counted = np.ones(len(tokens), bool) if counted is None else counted

    def loss(books):
        return codecs.straight_through(CODEC, tokens, {**PLAIN, **books}, counted).sum()

    return jax.grad(loss)(books)


def start(rng, codes=CODES):
    centroids = rng.normal(size=(1, codes, CHANNELS)).astype(np.float32)
    return {"centroids": centroids, "frequencies": np.full((1, codes), 1 / codes, np.float32)}


def test_centroids_are_averages_of_their_tokens():
    """Sums and counts with decay 0.9, kept by numpy, over ten batches of unequal size."""
    rng = np.random.default_rng(0)
    books = start(rng)
    sums = books["centroids"][0] * books["frequencies"][0][:, None]
    counts = books["frequencies"][0].copy()
    for _ in range(10):
        tokens = rng.normal(size=(rng.integers(20, 50), CHANNELS)).astype(np.float32)
        centroids = sums / counts[:, None]
        near = np.square(tokens[:, None] - centroids).sum(-1).argmin(1)
        chosen = np.eye(CODES)[near]
        sums = 0.9 * sums + 0.1 * chosen.T @ tokens / len(tokens)
        counts = 0.9 * counts + 0.1 * chosen.mean(0)
        books = follow(books, assignments(books, tokens), 0.9, rare=0)
        np.testing.assert_allclose(books["centroids"][0], sums / counts[:, None], rtol=1e-4)
        np.testing.assert_allclose(books["frequencies"][0], counts, rtol=1e-5)


def test_uncounted_tokens_change_nothing():
    rng = np.random.default_rng(0)
    books, tokens = start(rng), rng.normal(size=(20, CHANNELS)).astype(np.float32)
    counted = np.arange(20) < 12
    some = follow(books, assignments(books, tokens, counted))
    alone = follow(books, assignments(books, tokens[:12]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), some, alone)
    books["frequencies"][0, 0] = 0  # rare, but a step without tokens moves nothing
    none = follow(books, assignments(books, tokens, np.zeros(20, bool)))
    jax.tree.map(np.testing.assert_array_equal, none, books)


def test_rare_codes_are_moved_to_where_the_tokens_are():
    """All centroids but one are far from all tokens; in the end each serves its share."""
    rng = np.random.default_rng(0)
    books = start(rng)
    books["centroids"][0, 1:] += 100
    update = jax.jit(lambda b, t: follow(b, assignments(b, t), 0.9))

    def error(books, tokens):
        far = np.square(tokens[:, None] - np.asarray(books["centroids"][0])).sum(-1)
        return far.min(1).mean()

    tokens = rng.normal(size=(400, CHANNELS)).astype(np.float32)
    before = error(books, tokens)
    for _ in range(300):
        books = update(books, rng.normal(size=(200, CHANNELS)).astype(np.float32))
    assert np.asarray(books["frequencies"]).min() > 0.3 / CODES
    assert np.asarray(books["frequencies"]).sum() == pytest.approx(1, abs=1e-3)
    assert error(books, tokens) < 0.5 * before


def test_centroids_follow_tokens_that_move():
    rng = np.random.default_rng(0)
    books = start(rng)
    update = jax.jit(lambda b, t: follow(b, assignments(b, t), 0.9))
    for shift in np.linspace(0, 5, 200):
        tokens = (rng.normal(size=(200, CHANNELS)) + shift).astype(np.float32)
        books = update(books, tokens)
    assert np.abs(np.asarray(books["centroids"][0]).mean(0) - 5).max() < 1


CONFIG = OptimizerConfig(learning_rate=0.01, min_dim_size_to_factor=1, max_grad_norm=1e-3)


def trained(mesh, microbatches, train=True, steps=2):
    config = GlimmerConfig(
        dataclasses.replace(tiny.T5, emb_dim=16),
        memory_layers=2,
        rerank_layers=1,
        memory_codec="pq",
        train_codebooks=train,
    )
    model = GlimmerModel(config)
    mesh = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp])
    shapes, names = model.abstract_variables()
    optimizer = make_optimizer(CONFIG, names, model.frozen(shapes))
    params = jax.jit(fresh_params(model))()
    params["memory_codebooks"]["basis"] = jnp.eye(16)
    before = jax.tree.map(np.asarray, params)
    state = state_from_params(params, optimizer, mesh)
    shardings = state_shardings(optimizer, shapes, mesh)
    step = jit_train_step(make_train_step(model, optimizer, microbatches), shardings, mesh)
    with jax.set_mesh(mesh):
        for number in range(steps):
            state, metrics = step(state, put_batch(batch_at(number), mesh))
    return before, jax.tree.map(np.asarray, state.params), jax.device_get(metrics)


def test_sums_over_microbatches_and_meshes_are_those_of_the_batch():
    before, once, metrics = trained(MeshConfig(data=1), 1)
    books, began = once["memory_codebooks"], before["memory_codebooks"]
    still = {name for name, array in books.items() if (array == began[name]).all()}
    assert still == {"basis", "mean", "scale"}
    # Padding tokens and absent passages are not counted: shares stay shares.
    np.testing.assert_allclose(books["frequencies"].sum(-1), 1, rtol=1e-5)
    for mesh, microbatches in ((MeshConfig(data=1), 4), (MeshConfig(data=4, fsdp=2), 1)):
        _, other, found = trained(mesh, microbatches)
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)
        for name in ("centroids", "frequencies"):
            np.testing.assert_allclose(
                other["memory_codebooks"][name] - began[name], books[name] - began[name], atol=1e-5
            )


def test_codebooks_are_no_part_of_the_norm_and_are_not_clipped():
    """`max_grad_norm` is tiny, and would shrink the sums a thousand times."""
    before, after, metrics = trained(MeshConfig(data=1), 1, steps=1)
    _, _, fixed = trained(MeshConfig(data=1), 1, train=False, steps=1)
    assert metrics["grad_norm"] == pytest.approx(fixed["grad_norm"], rel=1e-5)
    change = after["memory_codebooks"]["frequencies"] - before["memory_codebooks"]["frequencies"]
    assert np.abs(change).sum() > 1e-4
