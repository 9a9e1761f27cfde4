"""Selection of the m best of K passages, and their concatenation for the decoder.

On a mesh that shards the passages of a question (axis `passages`), this is the first exchange between
the shards: every device receives all scores, then kept passages move to the device that reads them.
Live-B and the decoder's keys and values stay sharded over passages.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glimmer_jax import axes, partitioning
from glimmer_jax.partitioning import constrain

_STATES = (axes.BATCH, axes.PASSAGES, axes.LENGTH, axes.ACT_EMBED)
_MASK = (axes.BATCH, axes.PASSAGES, axes.LENGTH)


class Live(NamedTuple):
    """States and scores after Live-A."""

    states: jax.Array  # [B, K, N, D]
    mask: jax.Array  # bool [B, K, N], tokens of existing passages
    scores: jax.Array  # float32 [B, K], -inf for absent passages


def select(live: Live, num_kept: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The m best passages, in the retriever's order.

    The selection has no gradient. Ties go to the earlier passage. On a mesh that shards passages, m is
    padded with masked passages to a multiple of the shards.

    Args:
      live: states of all K passages and their scores.
      num_kept: m; None keeps all.

    Returns:
      States `[B, m', N, D]` and mask `[B, m', N]`, m' = m on one device, and int32 indices `[B, m]`
      into the K passages.

    Raises:
      ValueError: m exceeds K.
    """
    num_passages = live.scores.shape[1]
    if num_kept is None or num_kept == num_passages:
        kept = jnp.broadcast_to(jnp.arange(num_passages), live.scores.shape)
        return live.states, live.mask, kept
    if num_kept > num_passages:
        raise ValueError(
            f"num_kept={num_kept} exceeds the {num_passages} retrieved passages. Retrieve more "
            "(TASK_FEATURE_LENGTHS) or keep fewer (NUM_KEPT)."
        )
    scores = constrain(jax.lax.stop_gradient(live.scores), (axes.BATCH, None))
    _, kept = jax.lax.top_k(scores, num_kept)
    kept = jnp.sort(kept, axis=1)
    shards = partitioning.parts_in_scope(axes.PASSAGES)
    # Only the single row that initialises the parameters does not divide evenly.
    if shards > 1 and len(kept) % partitioning.parts_in_scope(axes.BATCH) == 0:
        return *_gather_sharded(live, kept, shards), kept
    states = jnp.take_along_axis(live.states, kept[:, :, None, None], axis=1)
    mask = jnp.take_along_axis(live.mask, kept[:, :, None], axis=1)
    return states, mask, kept


def _gather_sharded(live: Live, kept_BM: jax.Array, shards: int) -> tuple[jax.Array, jax.Array]:
    """Kept passages, sharded evenly over the devices that held all passages."""
    padding = -kept_BM.shape[1] % shards
    # No shard has this passage, so that it becomes zeros with a False mask.
    kept_BM = jnp.pad(kept_BM, ((0, 0), (0, padding)), constant_values=live.scores.shape[1])
    specs = [partitioning.spec(names) for names in (_STATES, _MASK, (axes.BATCH, None))]
    gather = jax.shard_map(
        functools.partial(_gather_local, axis=partitioning.AXIS_RULES[axes.PASSAGES]),
        in_specs=tuple(specs),
        out_specs=tuple(specs[:2]),
    )
    return gather(live.states, live.mask, kept_BM)


def _gather_local(states, mask, kept_BM, axis):
    """One device's contribution: the kept passages of its shard, scattered to all devices.

    All terms of the sum but one are zero, so the result is exact.
    """
    held = states.shape[1]
    own_BM = kept_BM - jax.lax.axis_index(axis) * held
    here_BM = (own_BM >= 0) & (own_BM < held)
    own_BM = jnp.clip(own_BM, 0, held - 1)

    def scatter(x):
        here = here_BM.reshape(*here_BM.shape, *(1,) * (x.ndim - 2))
        x = jnp.take_along_axis(x, own_BM.reshape(here.shape), axis=1)
        x = jnp.where(here, x, jnp.zeros((), x.dtype))
        return jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True)

    return scatter(states), scatter(mask.astype(jnp.int8)) > 0


def fuse(states: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Concatenates kept passages: `[B, M, N, D]`, `[B, M, N]` -> `[B, M*N, D]`, `[B, M*N]`."""
    batch, kept, length, dim = states.shape
    return states.reshape(batch, kept * length, dim), mask.reshape(batch, kept * length)
