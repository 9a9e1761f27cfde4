"""Memory codecs: how token states are stored. Encode while building, decode in the model.

A codec maps token states `[..., D]` to a dictionary of arrays `[..., *trailing]`, and back. The
store and the lookup move these arrays without interpreting them; only the model decodes. A smaller
codec therefore shrinks the files, the network traffic and the table in device memory alike. Models,
memory and retrieval share this module.

    bf16    2 D bytes per token
    int8    about D bytes per token
    pq      D / 8 bytes per token: 8-bit codes of 8 channels (MEMORY-VQ, arXiv 2308.14903); needs
            codebooks
    f16     2 D bytes per token: vectors of a dense index; token states may exceed its range
    f32     for tests of exact equality, and as the baseline of error measurements

To add a codec, write a class with the methods of `Codec` and add it to `_CODECS`. Store, table,
model and plan read its arrays from `array_specs`. Only codebooks of `ProductQuantisation` can be
learned and initialised (`memory.codebooks`, `models.codebooks`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, jax.Array]

# Points of one block of the nearest-centroid search: its distances take 64 MiB.
_POINT_BLOCK = 65536


class Codec(Protocol):
    """The interface of a memory codec."""

    @property
    def name(self) -> str:
        """Its name in gin files and stores."""
        ...

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Trailing shape and dtype of each stored array, for one token."""
        ...

    def codebook_specs(self, emb_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the float32 codebooks, learned from an encoder's states; empty if none."""
        ...

    def encode_cost(self, emb_dim: int) -> int:
        """Multiply-adds of the matrix products that encode one token."""
        ...

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        """States `[..., D]` of any float dtype -> stored arrays `[..., *trailing]`."""
        ...

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        """Stored arrays -> states `[..., D]` in `dtype`."""
        ...


def get(name: str) -> Codec:
    """The codec called `name`.

    Raises:
      ValueError: there is no such codec.
    """
    if name not in _CODECS:
        raise ValueError(f"memory_codec must be one of {sorted(_CODECS)}, got {name!r}.")
    return _CODECS[name]


def _round(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in a narrower float dtype."""
    info = jnp.finfo(dtype)
    # A compiler may remove a cast and its inverse; it keeps `reduce_precision`.
    return jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def straight_through(
    codec: Codec,
    states: jax.Array,
    codebooks: Arrays | None = None,
    counted: jax.Array | None = None,
) -> jax.Array:
    """States after a round trip through the store, with the gradient of the identity.

    Training and evaluation from tokens call this at the cut, so that the model always reads states
    as the store returns them. Shape and dtype are those of `states`.

    Args:
      codec: of the store.
      states: float `[..., D]`.
      codebooks: of the codec, if it has any.
      counted: bool `[...]`. If given, the "gradients" of `centroids` and `frequencies` are sums over
        the tokens where it is True, for the moving averages of `training.codebooks`: for a code with
        centroid e that n tokens x were assigned to, n e - sum(x) and -n. They add up over
        microbatches and devices as gradients do. If None, codebooks have no gradient.
    """
    fixed = jax.lax.stop_gradient(states)
    fixed_books = jax.lax.stop_gradient(codebooks)
    # Encode in float32: a codec may need more precision than a bfloat16 activation has left.
    arrays = codec.encode(fixed.astype(jnp.float32), fixed_books)
    stored = codec.decode(arrays, states.dtype, fixed_books)
    if counted is not None:
        assert isinstance(codec, ProductQuantisation)
        assert codebooks is not None and fixed_books is not None
        stored = _with_assignments(
            codec, stored, codebooks, fixed, fixed_books, arrays["codes"], counted
        )
    # `states - fixed` is exactly zero, so the value is exactly `stored`.
    return stored + (states - fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_assignments(
    codec: "ProductQuantisation",
    stored: jax.Array,
    codebooks: Arrays,
    states: jax.Array,
    fixed_books: Arrays,
    codes: jax.Array,
    counted: jax.Array,
) -> jax.Array:
    """`stored`, with the gradients of `straight_through`."""
    return stored


def _assignments_fwd(codec: Any, stored: jax.Array, _: Any, *assigned: Any) -> Any:
    # States and not subspaces: they are kept for the backward pass anyway.
    return stored, assigned


def _assignments_bwd(codec: "ProductQuantisation", assigned: Any, gradient: jax.Array) -> Any:
    states, books, codes, counted = assigned
    parts = codec.project(states, books)
    weights_N = counted.reshape(-1).astype(jnp.float32)
    parts_GNS = jnp.moveaxis(parts.reshape(-1, *parts.shape[-2:]), 1, 0)
    codes_GN = codes.reshape(-1, codes.shape[-1]).T.astype(jnp.int32)

    def one_subspace(of_one: Any) -> tuple[jax.Array, jax.Array]:
        centroids_CS, parts_NS, codes_N = of_one
        count = len(centroids_CS)
        counts_C = jax.ops.segment_sum(weights_N, codes_N, count)
        sums_CS = jax.ops.segment_sum(parts_NS * weights_N[:, None], codes_N, count)
        return counts_C[:, None] * centroids_CS - sums_CS, -counts_C

    errors, counts = jax.lax.map(one_subspace, (books["centroids"], parts_GNS, codes_GN))
    sums = jax.tree.map(jnp.zeros_like, dict(books)) | {"centroids": errors, "frequencies": counts}
    return gradient, sums, None, None, None, None


_with_assignments.defvjp(_assignments_fwd, _assignments_bwd)


class _WithoutCodebooks:
    """Defaults of codecs that learn nothing."""

    def codebook_specs(self, emb_dim: int) -> dict[str, tuple[int, ...]]:
        return {}

    def encode_cost(self, emb_dim: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Cast(_WithoutCodebooks):
    """Rounds every channel to `dtype`."""

    name: str
    dtype: Any

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"states": ((emb_dim,), jnp.dtype(self.dtype))}

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        return {"states": _round(states, self.dtype)}

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        return arrays["states"].astype(dtype)


@dataclasses.dataclass(frozen=True)
class Int8(_WithoutCodebooks):
    """One byte per channel, one scale per token, the largest channels stored separately.

    A few channels of T5's residual stream are a hundred times larger than the rest. A scale that
    covered them would round all other channels to zero. The `num_outliers(D)` largest channels of a
    token are therefore stored in bfloat16 with their indices, and the scale covers the others.
    """

    name: str = "int8"

    @staticmethod
    def num_outliers(emb_dim: int) -> int:
        """Channels per token that are stored separately: about 1 %, at least 4."""
        return min(emb_dim, max(4, emb_dim // 96))

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        outliers = self.num_outliers(emb_dim)
        return {
            "codes": ((emb_dim,), np.dtype(np.int8)),
            "scale": ((), np.dtype(np.float32)),
            "large": ((outliers,), jnp.dtype(jnp.bfloat16)),
            "places": ((outliers,), np.dtype(np.uint16)),
        }

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        states = jnp.asarray(states, jnp.float32)
        outliers = self.num_outliers(states.shape[-1])
        sizes, places = jax.lax.top_k(jnp.abs(states), min(outliers + 1, states.shape[-1]))
        # A gather, not a slice: XLA's CPU compiler turns a slice of `top_k` into a complete sort.
        # An optimization barrier before a slice aborts on many devices at optimization level 0.
        first = jnp.broadcast_to(jnp.arange(outliers), (*places.shape[:-1], outliers))
        places = jnp.take_along_axis(places, first, axis=-1)
        large = jnp.take_along_axis(states, places, axis=-1)
        # The largest remaining channel gets code 127. Outliers get it as well; it is never read.
        scale = jnp.min(sizes, -1) / 127
        # A token of zeros has scale 0 and decodes to zeros.
        codes = jnp.round(states / jnp.where(scale > 0, scale, 1.0)[..., None])
        return {
            "codes": jnp.clip(codes, -127, 127).astype(jnp.int8),
            "scale": scale,
            "large": _round(large, jnp.bfloat16),
            "places": places.astype(jnp.uint16),
        }

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        states = arrays["codes"].astype(jnp.float32) * arrays["scale"][..., None]
        channels = jax.lax.broadcasted_iota(jnp.int32, states.shape, states.ndim - 1)
        places, large = arrays["places"].astype(jnp.int32), arrays["large"].astype(jnp.float32)
        # A few selects, which fuse with the surrounding operations; a scatter would not.
        for i in range(places.shape[-1]):
            is_place = channels == places[..., i : i + 1]
            states = jnp.where(is_place, large[..., i : i + 1], states)
        return states.astype(dtype)


@dataclasses.dataclass(frozen=True)
class ProductQuantisation:
    """A code of `bits` bits for every `channels` channels.

    A token is centred and scaled per channel, so that a few large channels do not dominate the
    error; rotated by an orthogonal basis, which spreads the variance evenly over subspaces (Ge et
    al., 2013, "Optimized Product Quantization", section 3.2); and cut into G subspaces of S
    channels. Each subspace has C centroids, and stores the index of the nearest one.

    The codebooks are parameters of the model that reads the memory: `memory.codebooks` learns them
    for an encoder, and training may move the centroids with it (`training.codebooks`).
    `frequencies` are the shares of tokens that have each code; only training reads them.
    """

    name: str
    channels: int  # S, of a subspace
    bits: int  # per code; at most 8

    @property
    def num_codes(self) -> int:
        """C."""
        return 2**self.bits

    def num_subspaces(self, emb_dim: int) -> int:
        """G.

        Raises:
          ValueError: `channels` does not divide `emb_dim`.
        """
        if emb_dim % self.channels:
            raise ValueError(
                f"memory_codec={self.name!r} needs emb_dim to be a multiple of {self.channels}, got "
                f"{emb_dim}. Choose another MEMORY_CODEC."
            )
        return emb_dim // self.channels

    def array_specs(self, emb_dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"codes": ((self.num_subspaces(emb_dim),), np.dtype(np.uint8))}

    def codebook_specs(self, emb_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the float32 codebook arrays by name."""
        groups = self.num_subspaces(emb_dim)
        return {
            "centroids": (groups, self.num_codes, self.channels),
            "frequencies": (groups, self.num_codes),
            "basis": (emb_dim, emb_dim),
            "scale": (emb_dim,),
            "mean": (emb_dim,),
        }

    def encode_cost(self, emb_dim: int) -> int:
        """The rotation, and the products with every centroid of each subspace."""
        return emb_dim * emb_dim + self.num_codes * emb_dim

    def project(self, states: jax.Array, codebooks: Arrays) -> jax.Array:
        """States `[..., D]` -> float32 subspaces `[..., G, S]`, comparable with the centroids."""
        mean, scale = (_per_channel(codebooks[name], states.ndim) for name in ("mean", "scale"))
        scaled = (jnp.asarray(states, jnp.float32) - mean) / scale
        rotated = jnp.matmul(scaled, codebooks["basis"], precision="highest")
        return rotated.reshape(*states.shape[:-1], -1, self.channels)

    def encode(self, states: jax.Array, codebooks: Arrays | None = None) -> dict[str, jax.Array]:
        assert codebooks is not None
        parts = self.project(states, codebooks)
        parts_GNS = jnp.moveaxis(parts.reshape(-1, *parts.shape[-2:]), 1, 0)
        # One subspace at a time: the distances of all of them would not fit in memory.
        codes_GN = jax.lax.map(lambda pair: nearest(*pair), (parts_GNS, codebooks["centroids"]))
        return {"codes": codes_GN.T.reshape(parts.shape[:-1]).astype(jnp.uint8)}

    def decode(self, arrays: Arrays, dtype: Any, codebooks: Arrays | None = None) -> jax.Array:
        assert codebooks is not None
        codes, centroids = arrays["codes"], codebooks["centroids"]
        offsets = jnp.arange(centroids.shape[0], dtype=jnp.int32) * centroids.shape[1]
        rows = codes.astype(jnp.int32) + _per_channel(offsets, codes.ndim)
        parts = centroids.reshape(-1, self.channels)[rows]
        rotated = parts.reshape(*codes.shape[:-1], -1)
        scaled = jnp.matmul(rotated, codebooks["basis"].T, precision="highest")
        mean, scale = (_per_channel(codebooks[name], scaled.ndim) for name in ("mean", "scale"))
        return (scaled * scale + mean).astype(dtype)


def _per_channel(values: jax.Array, ndim: int) -> jax.Array:
    """`[D]` -> `[1, ..., 1, D]` with `ndim` dimensions."""
    return values.reshape(*(1,) * (ndim - 1), -1)


def nearest(points_NS: jax.Array, centroids_CS: jax.Array) -> jax.Array:
    """Index of the nearest centroid of each point, int32 `[N]`; ties go to the first."""
    count = len(points_NS)
    if count <= _POINT_BLOCK:
        return _nearest(points_NS, centroids_CS)
    padded = jnp.pad(points_NS, ((0, -count % _POINT_BLOCK), (0, 0)))
    blocks = padded.reshape(-1, _POINT_BLOCK, points_NS.shape[-1])
    return jax.lax.map(lambda block: _nearest(block, centroids_CS), blocks).reshape(-1)[:count]


def _nearest(points_NS: jax.Array, centroids_CS: jax.Array) -> jax.Array:
    # Half the squared distance, without the term that all centroids share.
    distance_CN = 0.5 * jnp.sum(centroids_CS * centroids_CS, -1)[:, None] - jnp.matmul(
        centroids_CS, points_NS.T, precision="highest"
    )
    # Two plain reductions along columns: on a CPU 17 times faster than `argmin`.
    least_N = jnp.min(distance_CN, 0)
    numbers = jnp.arange(len(centroids_CS), dtype=jnp.int32)[:, None]
    # Distances that are not numbers equal nothing; their code must exist all the same.
    last = len(centroids_CS) - 1
    return jnp.min(jnp.where(distance_CN == least_N[None], numbers, last), 0)


_CODECS: dict[str, Codec] = {
    "bf16": Cast("bf16", jnp.bfloat16),
    "int8": Int8(),
    "pq": ProductQuantisation("pq", channels=8, bits=8),
    "f16": Cast("f16", jnp.float16),
    "f32": Cast("f32", jnp.float32),
}
