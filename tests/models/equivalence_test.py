"""Sharded equals unsharded, scanned equals looped, remat equals none and is really on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.stacking import stack_layers, unstack_layers
from glimmer_jax.models.t5 import REMAT_POLICIES, EncoderStack
from glimmer_jax.partitioning import MeshConfig
from tests.models import tiny


@pytest.mark.parametrize(
    "mesh_config, loss",
    [
        (MeshConfig(data=8), tiny.LIGHT_LOSS),
        (MeshConfig(slice=2, data=2, fsdp=2), tiny.LIGHT_LOSS),
        (MeshConfig(data=2, model=4), tiny.LIGHT_LOSS),
        # The teacher's chunks of passages are sharded, too.
        (MeshConfig(data=2, fsdp=2, model=2), tiny.FULL_LOSS),
    ],
    ids=["8x1", "2 slices of 2x2", "2x4", "2x2x2"],
)
def test_sharded_equals_unsharded(mesh_config, loss):
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    want = tiny.loss_and_grad(tiny.GLIMMER, loss)(params, batch)
    mesh = partitioning.make_mesh(mesh_config)
    shardings = partitioning.shardings(tiny.abstract(tiny.GLIMMER)[1], mesh)
    partitioning.check_divisible(params, tiny.abstract(tiny.GLIMMER)[1], mesh)
    loss_fn = tiny.model(tiny.GLIMMER, loss).loss_fn
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
        got = jax.jit(
            jax.value_and_grad(lambda p, b: loss_fn(p, b, None), has_aux=True),
            compiler_options=tiny.QUICK,
        )(placed, rows)
    tiny.assert_trees_close(got[0], want[0], rtol=1e-5)
    tiny.assert_trees_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    kernel = placed["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    split = (16 // mesh.shape["fsdp"], 32 // mesh.shape["model"])
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == split


def test_scanned_layers_equal_looped_ones():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    looped = dataclasses.replace(tiny.GLIMMER, t5=dataclasses.replace(tiny.T5, scan_layers=False))
    want = tiny.loss_and_grad(tiny.GLIMMER, tiny.LIGHT_LOSS)(params, batch)
    loss, grad = tiny.loss_and_grad(looped, tiny.LIGHT_LOSS)(unstack_layers(params), batch)
    tiny.assert_trees_close(loss, want[0], rtol=1e-5)
    tiny.assert_trees_close(stack_layers(grad), want[1], rtol=1e-4, atol=1e-5)
    # The unrolled model has exactly the parameters of the scanned one.
    shapes = jax.eval_shape(unstack_layers, tiny.abstract(tiny.GLIMMER)[0])
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, tiny.abstract(looped)[0]
    )


def test_stacking_and_unstacking_are_inverse():
    params = tiny.params(tiny.GLIMMER)
    tiny.assert_trees_equal(stack_layers(unstack_layers(params)), params)


def encoder_loss(policy, scan_layers=True):
    config = dataclasses.replace(tiny.T5, remat_policy=policy, scan_layers=scan_layers)
    bias, mask = jnp.zeros((4, 8, 8)), jnp.ones((2, 8), bool)

    def loss(params, x):
        return jnp.sum(EncoderStack(config, 4).apply({"params": params}, x, mask, bias) ** 2)

    return loss


def encoder_inputs():
    layers = tiny.params(GlimmerConfig(tiny.T5))["live_encoder"]["live_b"]
    return layers, np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)


@pytest.mark.parametrize("policy", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_equals_none(policy):
    args = encoder_inputs()
    want, got = (
        jax.jit(jax.value_and_grad(encoder_loss(p)), compiler_options=tiny.QUICK)(*args)
        for p in ("none", policy)
    )
    tiny.assert_trees_close(got, want, rtol=1e-5, atol=1e-5)


def saved_bytes(function, *args):
    """Bytes that the forward pass keeps for the backward pass, arguments included."""
    residuals = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize("scan_layers", [True, False])
def test_each_remat_policy_keeps_less_than_the_one_before_it(scan_layers):
    layers, x = encoder_inputs()
    if not scan_layers:
        layers = unstack_layers(layers)
    saved = {
        policy: saved_bytes(encoder_loss(policy, scan_layers), layers, x)
        for policy in REMAT_POLICIES
    }
    policies = list(REMAT_POLICIES)
    assert policies[0] == "none" and policies[-1] == "full"
    assert sorted(policies, key=saved.__getitem__, reverse=True) == policies
    assert len(set(saved.values())) == len(policies)
    # Full remat keeps the layers' inputs, beside parameters, bias and mask.
    known = sum(leaf.nbytes for leaf in jax.tree.leaves(layers)) + 4 * 4 * 8 * 8 + 2 * 8
    assert saved["full"] <= known + 6 * x.nbytes


def count_equations(jaxpr, names):
    """Equations of some primitives, in every jaxpr inside as well."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name in names
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += count_equations(inner, names) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_remat_covers_every_stack_of_the_model(policy):
    """Memory encoder (for passages and for the question), Live-A, Live-B, decoder."""
    t5 = dataclasses.replace(tiny.T5, remat_policy=policy)
    model = tiny.model(dataclasses.replace(tiny.GLIMMER, t5=t5), tiny.LIGHT_LOSS)
    jaxpr = jax.make_jaxpr(lambda p: model.loss_fn(p, tiny.batch(), None)[0])(
        tiny.abstract(tiny.GLIMMER)[0]
    )
    assert count_equations(jaxpr.jaxpr, ("checkpoint", "remat2")) == (0 if policy == "none" else 5)
