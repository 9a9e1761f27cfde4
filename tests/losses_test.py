"""Losses against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import losses

B, K, T, V = 4, 5, 3, 7
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(B, T, V)).astype(np.float32)
TARGETS = RANDOM.integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)
SCORES = RANDOM.normal(size=(B, K)).astype(np.float32)
USEFUL = RANDOM.normal(size=(B, K)).astype(np.float32) * 3
# All five, three, one and no passage.
MASK = np.arange(K)[None] < np.array([5, 3, 1, 0])[:, None]
MASKED_SCORES = np.where(MASK, SCORES, -np.inf).astype(np.float32)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_kl(first, second, mask):
    out = np.zeros(len(mask))
    for row, keep in enumerate(mask):
        if keep.sum() >= 2:
            p, q = log_softmax(first[row][keep]), log_softmax(second[row][keep])
            out[row] = (np.exp(p) * (p - q)).sum()
    return out


def test_token_losses_equal_numpy():
    cross_entropy, z = losses.token_losses(LOGITS, TARGETS)
    log_probs = log_softmax(LOGITS)
    want = -np.take_along_axis(log_probs, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(cross_entropy, want, rtol=1e-5)
    log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(z, log_z**2, rtol=1e-5)


def test_log_likelihood_equals_numpy_and_is_zero_without_tokens():
    got = losses.log_likelihood(LOGITS, TARGETS, WEIGHTS)
    log_probs = np.take_along_axis(log_softmax(LOGITS), TARGETS[..., None], -1)[..., 0]
    want = (log_probs * WEIGHTS).sum(-1)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[3] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("direction", losses.KL_DIRECTIONS)
def test_distillation_equals_numpy(direction, temperature):
    got = losses.distillation(
        MASKED_SCORES, USEFUL, MASK, temperature=temperature, direction=direction
    )
    lm, rank = USEFUL / temperature, SCORES / temperature
    first, second = (lm, rank) if direction == "lm_to_rank" else (rank, lm)
    np.testing.assert_allclose(got, numpy_kl(first, second, MASK), rtol=1e-4, atol=1e-6)
    assert not np.asarray(got[2:]).any()


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_distillation_gradient_is_the_difference_of_the_distributions(temperature):
    grad = jax.grad(
        lambda s: jnp.sum(losses.distillation(s, USEFUL, MASK, temperature=temperature))
    )(MASKED_SCORES)
    want = np.zeros((B, K))
    for row, keep in enumerate(MASK):
        if keep.sum() >= 2:
            p_rank = np.exp(log_softmax(SCORES[row][keep] / temperature))
            p_lm = np.exp(log_softmax(USEFUL[row][keep] / temperature))
            want[row][keep] = (p_rank - p_lm) / temperature
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5 / temperature)


@pytest.mark.parametrize("direction", losses.KL_DIRECTIONS)
def test_distillation_gradient_is_zero_at_agreement(direction):
    # Scores that differ from log p by a constant a row give the same distribution.
    scores = np.where(MASK, USEFUL + np.arange(B)[:, None], -np.inf).astype(np.float32)

    def total(scores):
        return jnp.sum(
            losses.distillation(scores, USEFUL, MASK, temperature=0.5, direction=direction)
        )

    value, grad = jax.value_and_grad(total)(scores)
    assert abs(value) < 1e-6
    np.testing.assert_allclose(grad, 0, atol=2e-6)


@pytest.mark.parametrize("direction", losses.KL_DIRECTIONS)
def test_distillation_gradient_never_reaches_the_teacher(direction):
    def total(useful):
        return jnp.sum(
            losses.distillation(SCORES, useful, MASK, temperature=1.0, direction=direction)
        )

    assert not np.asarray(jax.grad(total)(USEFUL)).any()


@pytest.mark.parametrize("direction", losses.KL_DIRECTIONS)
def test_distillation_stays_finite_at_a_low_temperature(direction):
    useful, scores = USEFUL * 100, np.where(MASK, SCORES * 100, -np.inf).astype(np.float32)
    value, grad = jax.value_and_grad(
        lambda s: jnp.sum(
            losses.distillation(s, useful, MASK, temperature=0.01, direction=direction)
        )
    )(scores)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_an_unknown_direction_is_rejected():
    with pytest.raises(ValueError, match="kl_direction.*lm_to_rank.*forwards"):
        losses.distillation(SCORES, USEFUL, MASK, temperature=1.0, direction="forwards")


GOLD = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])


def test_supervised_rerank_equals_numpy_and_skips_rows_without_gold():
    def total(scores):
        each = losses.supervised_rerank(scores, GOLD, MASK, temperature=0.5)
        return jnp.sum(each), each

    (_, got), grad = jax.value_and_grad(total, has_aux=True)(MASKED_SCORES)
    log_rank = log_softmax(SCORES[0] / 0.5)
    # Row 1's gold passage does not exist, row 2 has no other passage, row 3 no passage at all.
    np.testing.assert_allclose(got, [-np.log(np.exp(log_rank[[1, 3]]).sum()), 0, 0, 0], rtol=1e-5)
    p = np.exp(log_rank)
    want = (p - np.where(GOLD[0], p / p[[1, 3]].sum(), 0)) / 0.5
    np.testing.assert_allclose(grad[0], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad[1:], 0, atol=1e-6)
