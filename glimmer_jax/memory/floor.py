"""The floor of a build: as many tokens a second as the devices' matrix products alone would allow."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_TRIES = 3
# Side of the square matrices, on a CPU and elsewhere.
_SIDE = {True: 512, False: 8192}


def matrix_rate(mesh: Mesh, operands: str) -> float:
    """Multiply-adds a second of all devices together, the best of a few products.

    Args:
      mesh: its devices multiply at the same time.
      operands: dtype; results are float32 on a CPU, and of that dtype elsewhere, as in the model.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    side, result = _SIDE[on_cpu], jnp.float32 if on_cpu else jnp.dtype(operands)
    own = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(np.ones((mesh.size, side, side), operands), own)

    @jax.jit
    def multiply(x: jax.Array) -> jax.Array:
        return jnp.einsum("nij,njk->nik", x, x, preferred_element_type=result)

    seconds = []
    for _ in range(_TRIES + 1):
        began = time.monotonic()
        jax.block_until_ready(multiply(x))
        seconds.append(time.monotonic() - began)
    # The first one was compiled.
    return mesh.size * side**3 / min(seconds[1:])
