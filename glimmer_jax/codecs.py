"""How memory is stored: encode when it is built, decode as the model's first operation.

A codec turns token states `[..., D]` into a dictionary of arrays `[..., *trailing]`, and back. The
store writes those arrays and knows nothing of their meaning; the lookup moves them as they are; only
the model decodes. So a smaller codec makes the disk, the wire and the table smaller alike.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, jax.Array]


class Codec(Protocol):
    """The interface of a memory codec."""

    @property
    def name(self) -> str:
        """What gin files and stores call it."""
        ...

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Trailing shape and dtype of each stored array, for one token."""
        ...

    def encode(self, states: jax.Array) -> dict[str, jax.Array]:
        """States `[..., D]`, any float dtype -> stored arrays `[..., *trailing]`."""
        ...

    def decode(self, arrays: Arrays, dtype: Any) -> jax.Array:
        """Stored arrays -> states `[..., D]` in `dtype`."""
        ...


@dataclasses.dataclass(frozen=True)
class Cast:
    """Rounds every channel to `dtype` and stores that."""

    name: str
    dtype: Any

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"states": ((emb_dim,), jnp.dtype(self.dtype))}

    def encode(self, states: jax.Array) -> dict[str, jax.Array]:
        kind = jnp.finfo(self.dtype)
        # Said twice, because a compiler may take a cast there and back for nothing at all.
        states = jax.lax.reduce_precision(states, kind.nexp, kind.nmant)
        return {"states": states.astype(self.dtype)}

    def decode(self, arrays: Arrays, dtype: Any) -> jax.Array:
        return arrays["states"].astype(dtype)


_CODECS: dict[str, Codec] = {
    "bf16": Cast("bf16", jnp.bfloat16),
    # For tests of exact equality, and for measuring what the others lose.
    "f32": Cast("f32", jnp.float32),
}


def get(name: str) -> Codec:
    """The codec called `name`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in _CODECS:
        raise ValueError(f"Unknown memory codec {name!r}; choose one of {sorted(_CODECS)}.")
    return _CODECS[name]


def straight_through(codec: Codec, states: jax.Array) -> jax.Array:
    """States as they come back from the store, with the gradient of the identity.

    Training and evaluation from tokens call this at the cut, so that the model learns on the memory
    it will be given. Shape and dtype of `states` are kept.
    """
    # float32, because a codec may need more range than a bfloat16 activation's rounding leaves.
    stored = codec.decode(codec.encode(states.astype(jnp.float32)), states.dtype)
    # In this order the value is exactly `stored`: the difference is exactly zero.
    return jax.lax.stop_gradient(stored) + (states - jax.lax.stop_gradient(states))
