"""Product quantisation of memory (MEMORY-VQ, arXiv 2308.14903): a code for every few channels.

A token's channels are brought to one size each, so that those of a hundred times the rest cost the
others nothing; turned by an orthogonal basis, so that no subspace has much more to say than another
(Ge et al., 2013, "Optimized Product Quantization", section 3.2); and cut into subspaces, of each of
which the nearest of a book of centroids is stored, by its number. Letters here: G subspaces of S
channels, C centroids each.

The codebooks are learnt once for an encoder (`memory.codebooks`) and are parameters of the model that
reads the memory. 16 times less than bfloat16: 8-bit codes of 8 channels, or the paper's 16-bit codes of
16 channels, which take 256 times as long to find.

How memory is stored: encode when it is built, decode as the model's first operation.

A codec turns token states `[..., D]` into a dictionary of arrays `[..., *trailing]`, and back. The
store writes those arrays and knows nothing of their meaning; the lookup moves them as they are; only
the model decodes. So a smaller codec makes the disk, the wire and the table smaller alike.

    bf16    2 D bytes a token
    int8    D bytes and some for the largest channels
    pq      D / 8 bytes: 8-bit codes of 8 channels; needs codebooks (`product_quantisation`)
    pq16    D / 8 bytes: 16-bit codes of 16 channels, as in MEMORY-VQ (arXiv 2308.14903)
    f32     for tests of exact equality, and for measuring what the others lose
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, jax.Array]

# Centroids that points are compared with at a time, and points at a time: a GiB for any of both.
_BLOCK = 4096
_POINTS = 65536


@dataclasses.dataclass(frozen=True)
class ProductQuantisation:
    """A code of `bits` bits for every `channels` channels; see the module."""

    name: str
    channels: int  # S, of a subspace
    bits: int  # of a code

    @property
    def num_codes(self) -> int:
        """C."""
        return 2**self.bits

    def num_subspaces(self, emb_dim: int) -> int:
        """G.

        Raises:
          ValueError: the channels do not divide.
        """
        if emb_dim % self.channels:
            raise ValueError(
                f"Memory codec {self.name!r} cuts a token into subspaces of {self.channels} channels, "
                f"and emb_dim={emb_dim} is no multiple. Choose another MEMORY_CODEC."
            )
        return emb_dim // self.channels

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        kind = np.dtype(np.uint8 if self.bits <= 8 else np.uint16)
        return {"codes": ((self.num_subspaces(emb_dim),), kind)}

    def codebook_specs(self, emb_dim: int) -> dict[str, tuple[int, ...]]:
        books = self.num_subspaces(emb_dim)
        return {
            "centroids": (books, self.num_codes, self.channels),
            "basis": (emb_dim, emb_dim),
            "scale": (emb_dim,),
            "mean": (emb_dim,),
        }

    def encode_cost(self, emb_dim: int) -> int:
        """Multiply-adds a token: to turn it, and to compare each subspace with all its centroids."""
        return emb_dim * emb_dim + self.num_codes * emb_dim

    def project(self, states: jax.Array, codebooks: Arrays) -> jax.Array:
        """States `[..., D]` -> float32 `[..., G, S]`, as the centroids see them."""
        even = (jnp.asarray(states, jnp.float32) - _like(states, codebooks["mean"])) / _like(
            states, codebooks["scale"]
        )
        turned = jnp.matmul(even, codebooks["basis"], precision="highest")
        return turned.reshape(*states.shape[:-1], -1, self.channels)

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        assert codebooks is not None
        parts = self.project(states, codebooks)
        parts_GNS = jnp.moveaxis(parts.reshape(-1, *parts.shape[-2:]), 1, 0)
        # One subspace after the other: all distances at once would not fit into memory.
        codes_GN = jax.lax.map(lambda pair: nearest(*pair), (parts_GNS, codebooks["centroids"]))
        kind = self.array_specs(states.shape[-1])["codes"][1]
        return {"codes": codes_GN.T.reshape(parts.shape[:-1]).astype(kind)}

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        assert codebooks is not None
        codes, centroids = arrays["codes"], codebooks["centroids"]
        first = jnp.arange(centroids.shape[0], dtype=jnp.int32) * centroids.shape[1]
        rows = codes.astype(jnp.int32) + first.reshape(*(1,) * (codes.ndim - 1), -1)
        parts = centroids.reshape(-1, self.channels)[rows]
        turned = parts.reshape(*codes.shape[:-1], -1)
        even = jnp.matmul(turned, codebooks["basis"].T, precision="highest")
        scale, mean = (_like(even, codebooks[name]) for name in ("scale", "mean"))
        return (even * scale + mean).astype(dtype)


def nearest(points_NS: jax.Array, centroids_CS: jax.Array) -> jax.Array:
    """int32 `[N]`, the nearest centroid of each point; the first of equals."""
    count = len(points_NS)
    if count <= _POINTS:
        return _nearest(points_NS, centroids_CS)
    padded = jnp.pad(points_NS, ((0, -count % _POINTS), (0, 0)))
    blocks = padded.reshape(-1, _POINTS, points_NS.shape[-1])
    return jax.lax.map(lambda some: _nearest(some, centroids_CS), blocks).reshape(-1)[:count]


def _nearest(points_NS: jax.Array, centroids_CS: jax.Array) -> jax.Array:
    num_codes, size = centroids_CS.shape
    block = min(num_codes, _BLOCK)

    def closest(best: tuple[jax.Array, jax.Array], at: tuple[jax.Array, jax.Array]):
        first, some_CS = at
        # The square of the distance, less what is the same for all centroids, halved.
        far_CN = 0.5 * jnp.sum(some_CS * some_CS, -1)[:, None] - jnp.matmul(
            some_CS, points_NS.T, precision="highest"
        )
        # Two plain reductions down the columns: on a CPU a seventeenth of `argmin`'s time.
        least_N = jnp.min(far_CN, 0)
        numbers = jnp.arange(block, dtype=jnp.int32)[:, None]
        code = jnp.min(jnp.where(far_CN == least_N[None], numbers, block - 1), 0)
        nearer = least_N < best[1]
        return (jnp.where(nearer, first + code, best[0]), jnp.where(nearer, least_N, best[1]))

    # Of the points, so that inside a `shard_map` it varies as they do.
    start = (jnp.zeros_like(points_NS[:, 0], jnp.int32), jnp.full_like(points_NS[:, 0], jnp.inf))
    firsts = jnp.arange(0, num_codes, block, dtype=jnp.int32)
    blocks = centroids_CS.reshape(-1, block, size)
    best, _ = jax.lax.scan(lambda b, at: (closest(b, at), None), start, (firsts, blocks))
    return best[0]


def _like(states: jax.Array, channels: jax.Array) -> jax.Array:
    """Values of each channel `[D]` with as many dimensions as the states."""
    return channels.reshape(*(1,) * (states.ndim - 1), -1)


class Codec(Protocol):
    """The interface of a memory codec."""

    @property
    def name(self) -> str:
        """What gin files and stores call it."""
        ...

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Trailing shape and dtype of each stored array, for one token."""
        ...

    def codebook_specs(self, emb_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the float32 arrays that the codec learns from an encoder's states; or none."""
        ...

    def encode_cost(self, emb_dim: int) -> int:
        """Multiply-adds of matrix products that encoding takes, for one token."""
        ...

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        """States `[..., D]`, any float dtype -> stored arrays `[..., *trailing]`."""
        ...

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        """Stored arrays -> states `[..., D]` in `dtype`."""
        ...


class _WithoutCodebooks:
    """Of codecs that have nothing to learn."""

    def codebook_specs(self, emb_dim: int) -> dict[str, tuple[int, ...]]:
        return {}

    def encode_cost(self, emb_dim: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Cast(_WithoutCodebooks):
    """Rounds every channel to `dtype` and stores that."""

    name: str
    dtype: Any

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"states": ((emb_dim,), jnp.dtype(self.dtype))}

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        kind = jnp.finfo(self.dtype)
        # Said twice, because a compiler may take a cast there and back for nothing at all.
        states = jax.lax.reduce_precision(states, kind.nexp, kind.nmant)
        return {"states": states.astype(self.dtype)}

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        return arrays["states"].astype(dtype)


@dataclasses.dataclass(frozen=True)
class Int8(_WithoutCodebooks):
    """One byte a channel: each token has a scale of its own, and keeps its largest channels apart.

    T5's residual stream has a few channels that are a hundred times the rest. With them inside, the
    scale would round all other channels to nothing; so the largest `kept(D)` channels of a token
    are stored in bfloat16 with their places, and the scale is that of the others.
    """

    name: str = "int8"

    @staticmethod
    def kept(emb_dim: int) -> int:
        """Channels of a token that are stored apart: about 1 %, and at least 4."""
        return min(emb_dim, max(4, emb_dim // 96))

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        kept = self.kept(emb_dim)
        return {
            "codes": ((emb_dim,), np.dtype(np.int8)),
            "scale": ((), np.dtype(np.float32)),
            "large": ((kept,), jnp.dtype(jnp.bfloat16)),
            "places": ((kept,), np.dtype(np.uint16)),
        }

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        states = jnp.asarray(states, jnp.float32)
        kept = self.kept(states.shape[-1])
        sizes, places = jax.lax.top_k(jnp.abs(states), min(kept + 1, states.shape[-1]))
        # Gathered, not sliced: a CPU's compiler would see a part of a sort, and sort all of it. An
        # optimisation barrier before a slice hides it too, and aborts on many devices at level 0.
        first = jnp.broadcast_to(jnp.arange(kept), (*places.shape[:-1], kept))
        places = jnp.take_along_axis(places, first, axis=-1)
        kind = jnp.finfo(jnp.bfloat16)
        large = jnp.take_along_axis(states, places, axis=-1)
        # The largest of the others gets code 127; those stored apart get it too, and it is not read.
        scale = jnp.min(sizes, -1) / 127
        # A token of zeros has scale 0, and gives zeros.
        codes = jnp.round(states / jnp.where(scale > 0, scale, 1.0)[..., None])
        return {
            "codes": jnp.clip(codes, -127, 127).astype(jnp.int8),
            "scale": scale,
            "large": jax.lax.reduce_precision(large, kind.nexp, kind.nmant).astype(jnp.bfloat16),
            "places": places.astype(jnp.uint16),
        }

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        rest = arrays["codes"].astype(jnp.float32) * arrays["scale"][..., None]
        return _put(rest, arrays["places"], arrays["large"]).astype(dtype)


def _put(states: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """States `[..., D]` with `values` `[..., n]` at `places` `[..., n]`."""
    channels = jax.lax.broadcasted_iota(jnp.int32, states.shape, states.ndim - 1)
    # A few selections that fuse with what is around them, where a scatter would not.
    for i in range(places.shape[-1]):
        here = channels == places[..., i : i + 1].astype(jnp.int32)
        states = jnp.where(here, values[..., i : i + 1].astype(states.dtype), states)
    return states


_CODECS: dict[str, Codec] = {
    "bf16": Cast("bf16", jnp.bfloat16),
    "int8": Int8(),
    "pq": ProductQuantisation("pq", channels=8, bits=8),
    "pq16": ProductQuantisation("pq16", channels=16, bits=16),
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


def straight_through(codec: Codec, states: jax.Array, codebooks: Arrays | None = None) -> jax.Array:
    """States as they come back from the store, with the gradient of the identity.

    Training and evaluation from tokens call this at the cut, so that the model learns on the memory
    it will be given. Shape and dtype of `states` are kept. The gradient of what was decoded goes to
    `codebooks` as well; stop it before where they are not trained.
    """
    fixed = jax.lax.stop_gradient(states)
    # float32, because a codec may need more range than a bfloat16 activation's rounding leaves.
    arrays = codec.encode(fixed.astype(jnp.float32), jax.lax.stop_gradient(codebooks))
    stored = codec.decode(arrays, states.dtype, codebooks)
    # In this order the value is exactly `stored`: the difference is exactly zero.
    return stored + (states - fixed)
