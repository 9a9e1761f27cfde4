"""Attention against numpy in float64, and what masks do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.nn.attention import MANY_KEYS, Attention, attend

H, X, Y, C = 2, 3, 5, 4


def arrays(seed=0, lead=(2,)):
    random = np.random.default_rng(seed)
    query = random.normal(size=(*lead, X, H, C)).astype(np.float32)
    key = random.normal(size=(*lead, Y, H, C)).astype(np.float32)
    value = random.normal(size=(*lead, Y, H, C)).astype(np.float32)
    mask = random.random((*lead, 1, X, Y)) < 0.6
    mask[..., 0] = True
    return query, key, value, mask, random.normal(size=(H, X, Y)).astype(np.float32)


def numpy_attend(query, key, value, mask, bias):
    logits = np.einsum("...xhc,...yhc->...hxy", *(a.astype(np.float64) for a in (query, key)))
    logits = np.where(mask, logits + bias, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("...hxy,...yhc->...xhc", weights, value.astype(np.float64))


@pytest.mark.parametrize("lead", [(2,), (2, 3), ()])
def test_attention_equals_numpy_with_any_leading_dimensions(lead):
    args = arrays(lead=lead)
    np.testing.assert_allclose(attend(*args), numpy_attend(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [H, 1], ids=["padded", "multi-query"])
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_a_single_query_on_a_tpu_equals_numpy(groups, lead, monkeypatch):
    branches = []

    def on_tpu(*args, tpu, default):
        branches.append(tpu)
        return tpu(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    random = np.random.default_rng(1)
    query = random.normal(size=(*lead, 1, H, C)).astype(np.float32)
    key, value = random.normal(size=(2, *lead, MANY_KEYS, groups, C)).astype(np.float32)
    mask = random.random((*lead, 1, 1, MANY_KEYS)) < 0.6
    bias = random.normal(size=(H, 1, MANY_KEYS)).astype(np.float32)
    repeated = (np.repeat(x, H // groups, axis=-2) for x in (key, value))
    want = numpy_attend(query, *repeated, mask, bias)
    got = attend(query, key, value, mask, bias)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # The heads that share a key head are rows of one product already.
    assert bool(branches) == (groups == H)


def test_logits_are_not_scaled():
    query, key, value, mask, bias = arrays()
    scaled = numpy_attend(query / np.sqrt(C), key, value, mask, bias)
    assert np.abs(attend(query, key, value, mask, bias) - scaled).max() > 1e-2


def test_a_query_that_sees_no_key_gets_zeros_and_a_finite_gradient():
    query, key, value, mask, bias = arrays()
    mask[0] = False
    out = attend(query, key, value, mask, bias)
    assert not np.asarray(out[0]).any()
    np.testing.assert_allclose(
        out[1], numpy_attend(query[1], key[1], value[1], mask[1], bias), rtol=1e-5, atol=1e-6
    )
    grads = jax.grad(lambda *a: jnp.sum(attend(*a, mask, bias) ** 2), (0, 1, 2))(query, key, value)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert not np.asarray(grad[0]).any()


def test_masked_keys_do_not_affect_the_output():
    query, key, value, mask, bias = arrays()
    mask[..., -1] = False
    before = attend(query, key, value, mask, bias)
    key[:, -1], value[:, -1] = 1e4, -1e4
    np.testing.assert_array_equal(attend(query, key, value, mask, bias), before)


def test_large_logits_do_not_overflow():
    query, key, value, mask, bias = arrays()
    out = attend(query * 1e4, key * 1e4, value, mask, bias)
    assert np.isfinite(out).all()


def test_softmax_is_float32_for_bfloat16_inputs():
    query, key, value, mask, bias = arrays()
    low = [jnp.asarray(a, jnp.bfloat16) for a in (query, key, value)]
    exact = numpy_attend(*(np.asarray(a, np.float32) for a in low), mask, bias)
    out = attend(*low, mask, bias)
    assert out.dtype == jnp.bfloat16
    # Only weights and values are rounded; rounded logits would be off by far more.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2e-2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_reading_states_equals_attending_to_their_keys_and_values(groups):
    random = np.random.default_rng(1)
    module = Attention(
        emb_dim=8, num_heads=4, num_kv_heads=groups, head_dim=3, dropout_rate=0.0, dtype=np.float32
    )
    x, states = (random.normal(size=(2, n, 8)).astype(np.float32) for n in (X, Y))
    mask = random.random((2, 1, 1, Y)) < 0.7
    bias = random.normal(size=(2, 4, X, Y)).astype(np.float32)  # of each sequence

    def whole(module, x, states):
        return module(x, module.keys_values(states), mask, bias)

    variables = nn.unbox(module.init(jax.random.key(0), x, states, method=whole))
    expected = module.apply(variables, x, states, method=whole)
    got = module.apply(variables, x, states, mask, bias, method="read")
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
