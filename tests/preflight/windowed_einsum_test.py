"""A `Dense` on an fsdp mesh gathers its kernel before the product, forward and backward.

XLA's TPU compiler may otherwise overlap both in a loop over shards that rewrites the complete output.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from glimmer_jax import axes, partitioning
from glimmer_jax.nn.layers import Dense
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import chips

D, F = 768, 2048  # T5 Base
NAMES = (axes.EMBED, axes.MLP)
ACTIVATION = (axes.BATCH, None, axes.ACT_MLP)
DENSE = Dense(F, NAMES, jnp.bfloat16)
# The kernel that is sharded in its output dimension.
BACK = (axes.MLP, axes.EMBED)
DENSE_BACK = Dense(D, BACK, jnp.bfloat16)


def dense(kernel, x):
    return partitioning.constrain(DENSE.apply({"params": {"kernel": kernel}}, x), ACTIVATION)


def dense_back(kernel, x):
    return DENSE_BACK.apply({"params": {"kernel": kernel}}, x)


def plain_dot(kernel, x):
    return partitioning.constrain(x @ kernel.astype(jnp.bfloat16), ACTIVATION)


def gradient(function):
    return lambda kernel, x, y: jax.vjp(function, kernel, x)[1](y)


def loops(function, topology, fsdp, names=NAMES, shape=(D, F)):
    """The number of loops in the program that the TPU compiler makes of `function`."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp), chips.devices(chips.parse_topology(topology)))
    kernel_sharding = NamedSharding(mesh, partitioning.spec(names))
    rows = partitioning.batch_sharding(mesh)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=kernel_sharding)]
    for width in shape:
        shape = (8 * fsdp, 14080, width)  # 8 questions per chip, 40 passages of 352 tokens
        shapes.append(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows))
    outputs = (kernel_sharding, rows) if len(signature(function)) == 3 else rows
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, out_shardings=outputs)
        text = jitted.lower(*shapes[: len(signature(function))]).compile().as_text()
    return text.count(" while(")


def signature(function):
    return function.__code__.co_varnames[: function.__code__.co_argcount]


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@needs_libtpu
@pytest.mark.parametrize("topology, fsdp", [("v5e:4x4", 16), ("v5p:2x2x2", 8)])
@pytest.mark.parametrize("function", [dense, gradient(dense)], ids=["forward", "gradient"])
def test_dense_compiles_without_windowed_einsum(function, topology, fsdp):
    assert loops(function, topology, fsdp) == 0


@needs_libtpu
@pytest.mark.parametrize(
    "function", [dense_back, gradient(dense_back)], ids=["forward", "gradient"]
)
def test_dense_back_to_the_model_compiles_without_windowed_einsum(function):
    assert loops(function, "v5e:4x4", 16, BACK, (F, D)) == 0


@needs_libtpu
@pytest.mark.parametrize("function", [plain_dot, gradient(plain_dot)], ids=["forward", "gradient"])
def test_control_without_gather_has_windowed_einsum(function):
    assert loops(function, "v5e:4x4", 16) > 0


@pytest.mark.parametrize("operands", [None, jnp.bfloat16], ids=["plain", "operands"])
def test_no_gathered_kernel_is_kept_as_a_residual(operands):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    kernel = jax.device_put(
        np.ones((8, 12), np.float32), NamedSharding(mesh, partitioning.spec(NAMES))
    )
    x = jax.device_put(np.ones((4, 3, 8), np.float32), partitioning.batch_sharding(mesh))
    layer = Dense(12, NAMES, jnp.float32, operands)
    with jax.set_mesh(mesh):
        _, vjp = jax.vjp(
            lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x), kernel, x
        )
    residuals = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape == kernel.shape]
    assert residuals
    for residual in residuals:
        assert residual.sharding.shard_shape(residual.shape) == (2, 12)
