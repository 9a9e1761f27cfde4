"""The TPU's attention kernel, compiled for every generation."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from glimmer_jax import axes, partitioning
from glimmer_jax.nn import tpu_attention
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import chips


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    "topology, devices, length",
    [
        *(
            (topology, devices, length)
            for topology, devices in (
                ("v4:2x2x1", 4),
                ("v5e:2x2", 4),
                ("v5p:2x2x1", 4),
                ("v6e:2x2", 4),
                ("tpu7x:2x2x1", 8),
            )
            for length in (352, 512, 639, 1024)
            if topology != "v4:2x2x1" or length <= 512
        ),
    ],
)
def test_every_generation_compiles_it_without_logits_in_memory(topology, devices, length):
    mesh = make_mesh(
        MeshConfig(data=1, fsdp=devices), chips.devices(chips.parse_topology(topology))
    )
    rows, passages, heads, channels = 2 * devices, 10, 12, 64
    states = jax.ShapeDtypeStruct(
        (rows, passages, length, heads, channels),
        jnp.bfloat16,
        sharding=jax.NamedSharding(mesh, partitioning.spec((axes.BATCH,))),
    )
    mask = jax.ShapeDtypeStruct((rows, passages, length), bool, sharding=states.sharding)
    bias = jax.ShapeDtypeStruct(
        (heads, length, length), jnp.float32, sharding=partitioning.replicated(mesh)
    )

    def total(query, key, value, bias, mask):
        return jnp.sum(tpu_attention.attend(query, key, value, mask, bias).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(total, (0, 1, 2, 3))).lower(states, states, states, bias, mask)
        compiled = lowered.compile()
    assert lowered.as_text().count("tpu_custom_call") == 2
    logits = rows // devices * passages * heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits
