"""The TPU's attention kernel: equal to the plain path in interpret mode."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.nn import attention, tpu_attention
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.preflight.flops import count_flops
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import state_from_params, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step
from tests.models import tiny

B, K = 4, 2
CLOSE = dict(rtol=3e-5, atol=3e-5)
interpreted = functools.partial(tpu_attention.attend, interpret=True)


def plain(query, key, value, key_mask, bias, keep):
    return attention.attend(
        query,
        key,
        value,
        key_mask[..., None, None, :],
        bias,
        lambda weights: weights * keep[..., None, :],
    )


def arrays(length, heads, channels):
    """Queries, keys, values, a key mask with gaps and one empty sequence, a bias, dropout factors."""
    random = np.random.default_rng(length)
    states = (random.normal(size=(B, K, length, heads, channels)) / channels**0.25 for _ in "qkv")
    mask = random.random((B, K, length)) < 0.7
    mask[0, 0] = False
    bias = random.normal(size=(heads, length, length))
    keep = np.where(random.random((B, K, heads, length)) < 0.8, 1.25, 0.0)
    query, key, value, bias, keep = (np.float32(x) for x in (*states, bias, keep))
    return query, key, value, mask, bias, keep


def value_and_gradients(function, inputs):
    """The output and the gradients of queries, keys, values and bias."""
    query, key, value, mask, bias, keep = inputs
    weights = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    def total(query, key, value, bias):
        out = function(query, key, value, mask, bias, keep)
        return jnp.sum(out * weights), out

    grad = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))
    gradients, out = grad(query, key, value, bias)
    return out, *gradients


@pytest.mark.parametrize(
    "length, heads, channels",
    [(7, 3, 8), (12, 4, 64), (9, 2, 128)],
    ids=["all heads at once", "two heads at once", "one head at once"],
)
def test_output_and_all_gradients_equal_the_plain_path(length, heads, channels):
    inputs = arrays(length, heads, channels)
    expected = value_and_gradients(plain, inputs)
    result = value_and_gradients(interpreted, inputs)
    for got, want in zip(result, expected, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, **CLOSE)
    out, to_query, *_ = result
    assert not np.asarray(out[0, 0]).any() and not np.asarray(to_query[0, 0]).any()


def test_without_dropout_factors_all_weights_are_kept():
    *inputs, keep = arrays(7, 2, 8)
    expected = plain(*inputs, np.ones_like(keep))
    np.testing.assert_allclose(interpreted(*inputs), expected, **CLOSE)


@pytest.mark.parametrize(
    "sizes", [dict(data=4), dict(data=1, fsdp=4), dict(data=2, model=2), dict(data=2, passages=2)]
)
def test_sharded_equals_unsharded_also_in_the_gradient_of_the_bias(sizes):
    inputs = arrays(6, 4, 8)
    expected = value_and_gradients(plain, inputs)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    with jax.set_mesh(mesh):
        result = value_and_gradients(interpreted, inputs)
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)


def config_with(kernel, **t5):
    t5 = dataclasses.replace(tiny.T5, attention=kernel, **t5)
    return dataclasses.replace(tiny.GLIMMER, t5=t5)


def test_a_model_has_the_same_loss_and_gradients(monkeypatch):
    monkeypatch.setitem(attention.FUSED, "tpu", interpreted)
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    (loss, _), gradients = tiny.loss_and_grad(config_with("tpu"))(params, batch)
    (expected, _), expected_gradients = tiny.loss_and_grad(config_with("plain"))(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=3e-5)
    tiny.assert_trees_close(gradients, expected_gradients, rtol=3e-5, atol=3e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_training_steps_with_dropout_are_the_same(monkeypatch):
    monkeypatch.setitem(attention.FUSED, "tpu", interpreted)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    results = []
    for kernel in ("tpu", "plain"):
        model = tiny.model(config_with(kernel, dropout_rate=0.1), tiny.LIGHT_LOSS)
        shapes, names = model.abstract_variables()
        optimizer = make_optimizer(OptimizerConfig(min_dim_size_to_factor=1), names)
        step = jit_train_step(
            make_train_step(model, optimizer), state_shardings(optimizer, shapes, mesh), mesh
        )
        state = state_from_params(tiny.params(model.config), optimizer, mesh)
        with jax.set_mesh(mesh):
            for seed in range(3):
                state, _ = step(state, put_batch(tiny.batch(seed), mesh))
        results.append(jax.device_get(state.params))
    tiny.assert_trees_close(*results, rtol=3e-4, atol=3e-4)


def test_flops_of_a_kernel_are_counted_for_each_step_of_its_grid():
    query, key, value, mask, bias, keep = arrays(7, 2, 64)
    with_kernel = jax.make_jaxpr(interpreted)(query, key, value, mask, bias, keep)
    without = jax.make_jaxpr(plain)(query, key, value, mask, bias, keep)
    assert count_flops(with_kernel) == count_flops(without) > 0


def test_other_devices_are_rejected():
    with pytest.raises(ValueError, match="ATTENTION.*cpu.*ATTENTION='plain'"):
        tpu_attention.attend(*arrays(6, 2, 8))
