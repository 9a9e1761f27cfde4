"""On a GPU, skipped without: `GLIMMER_TEST_PLATFORM=cuda,cpu make test ARGS="tests/gpu_test.py -n 0"`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.nn import attention, cudnn_attention
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import state_from_params, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step
from tests.models import tiny

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")

T5 = dataclasses.replace(tiny.T5, head_dim=8, dropout_rate=0.1)
# All passages are kept: a rounding that chose others would be no rounding of the loss.
FLOAT32 = dataclasses.replace(tiny.GLIMMER, t5=T5, num_kept=tiny.K)
LOW = {
    attention: dataclasses.replace(
        FLOAT32, t5=dataclasses.replace(T5, dtype="bfloat16", attention=attention)
    )
    for attention in ("plain", "cudnn")
}


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32 where float32 is what others are compared with."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("length", [304, 63])
def test_cudnn_equals_attention_in_float32_and_its_gradients(length):
    random = np.random.default_rng(0)
    heads, channels = 12, 64
    states = random.normal(size=(3, 2, 4, length, heads, channels)).astype(np.float32)
    query, key, value = jnp.asarray(states, jnp.bfloat16)
    mask = np.arange(length) < random.integers(1, length + 1, (2, 4, 1))
    mask[0, 0] = False
    bias = jnp.asarray(3 * random.normal(size=(heads, length, length)), jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(0), query.shape)

    def run(function, dtype):
        def total(query, key, value, bias):
            out = function(query, key, value, bias)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        step = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))
        arguments = (x.astype(dtype) for x in (query / 2, key, value))
        (_, out), grads = step(*arguments, bias.astype(jnp.float32))
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    plain = run(
        lambda q, k, v, b: attention.attend(q, k, v, mask[..., None, None, :], b), jnp.float32
    )
    fused = run(lambda q, k, v, b: cudnn_attention.attend(q, k, v, mask, b), jnp.bfloat16)
    for got, want in zip(fused, plain, strict=True):
        assert np.isfinite(got).all()
        # A few roundings of 2^-8 each, beside the largest.
        assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


def loss_and_gradients(config):
    model = GlimmerModel(config, tiny.LIGHT_LOSS)

    def loss(params):
        return model.loss_fn(params, tiny.batch(), jax.random.key(3))[0]

    return jax.jit(jax.value_and_grad(loss))(tiny.as_jax(tiny.params(config)))


@pytest.mark.parametrize("attention", sorted(LOW))
def test_loss_and_gradients_in_bfloat16_are_those_of_float32(attention):
    loss, grads = loss_and_gradients(FLOAT32)
    low_loss, low_grads = loss_and_gradients(LOW[attention])
    np.testing.assert_allclose(low_loss, loss, rtol=0.02)
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, low_grads, grads))
    assert gap < 0.15 * optax.tree.norm(grads)


def three_steps(config, devices):
    """Losses of three training steps with FSDP over the devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    model = GlimmerModel(config, tiny.LIGHT_LOSS)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.01, min_dim_size_to_factor=1), model.abstract_variables()[1]
    )
    state = state_from_params(tiny.params(config), optimizer, mesh)
    step = jit_train_step(
        make_train_step(model, optimizer, 1), state_shardings(optimizer, state.params, mesh), mesh
    )
    losses = []
    with jax.set_mesh(mesh):
        for seed in range(3):
            state, metrics = step(state, put_batch(tiny.batch(seed), mesh))
            losses.append(float(metrics["loss"]))
    return losses


def test_training_steps_equal_those_on_the_cpu():
    gpu, cpu = (three_steps(FLOAT32, jax.devices(platform)[:1]) for platform in ("gpu", "cpu"))
    np.testing.assert_allclose(gpu, cpu, rtol=1e-3)


@pytest.mark.parametrize("attention", sorted(LOW))
def test_training_steps_in_bfloat16_follow_float32_on_all_gpus(attention):
    devices = jax.devices("gpu")
    devices = devices[: 2 ** (min(len(devices), tiny.B).bit_length() - 1)]
    np.testing.assert_allclose(
        three_steps(LOW[attention], devices), three_steps(FLOAT32, devices), rtol=0.03
    )
