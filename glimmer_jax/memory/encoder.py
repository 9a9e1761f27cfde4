"""The encode step: every device runs the one-device program on rows of its own.

Passages are independent, so nothing needs to be split inside one: parameters are whole on every
device while it encodes, and rows are dealt out. So the bits do not depend on the mesh, also where
the model, left alone, would spread heads and feed-forward over devices and add up in another order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax import codecs

# Parameters and int32 tokens `[n, P]` -> states `[n, P, D]`; such as `GlimmerModel.memory_states`.
StatesFunction = Callable[[Any, jax.Array], jax.Array]
# int32 tokens `[n, P]` -> states `[n, P, D]`.
States = Callable[[np.ndarray], Any]
# int32 tokens `[n, P]` -> the codec's arrays `[n, P, *trailing]`, and bool `[n, P]`: whether all
# channels of a token were finite before they were encoded (an integer codec would hide it).
Encode = Callable[[np.ndarray], tuple[Mapping[str, Any], Any]]


def bind_encoder(memory_states: StatesFunction, params: Any, mesh: Mesh, codec: str) -> Encode:
    """`memory_states` and the codec as the build wants them, rows spread over all of `mesh`."""
    return _bind(encode_step(memory_states, mesh, codec), params, mesh)


def encode_step(memory_states: StatesFunction, mesh: Mesh, codec: str) -> Any:
    """`(params, tokens [n, P]) -> (codec's arrays, finite)`, jitted, rows spread over `mesh`."""

    def encode(params, tokens):
        states = memory_states(params, tokens)
        return encode_states(codec, states, params.get("memory_codebooks"))

    return _spread(encode, mesh)


def bind_states(memory_states: StatesFunction, params: Any, mesh: Mesh) -> States:
    """`memory_states` alone, for measuring what a codec loses."""
    return _bind(_spread(memory_states, mesh), params, mesh)


def encode_states(
    codec: str, states: jax.Array, codebooks: codecs.Arrays | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """States `[n, P, D]` -> the codec's arrays and which tokens are finite, before and after."""
    arrays = codecs.get(codec).encode(states, codebooks)
    finite = jnp.isfinite(states).all(-1)
    for array in arrays.values():
        if jnp.issubdtype(array.dtype, jnp.floating):
            finite &= jnp.isfinite(array).reshape(*finite.shape, -1).all(-1)
    return arrays, finite


def _spread(function: Callable[[Any, jax.Array], Any], mesh: Mesh) -> Any:
    rows = PartitionSpec(mesh.axis_names)
    spread = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
        # The model is not written for it: its scans start from values that are the same everywhere.
        check_vma=False,
    )
    # Parameters are an argument: as a constant they would be compiled in for every bucket.
    return jax.jit(spread)


def _bind(jitted: Callable[[Any, jax.Array], Any], params: Any, mesh: Mesh) -> Callable:
    placement = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def run(tokens: np.ndarray):
        return jitted(params, jax.device_put(tokens, placement))

    return run
