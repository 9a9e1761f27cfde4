"""The choice: the m best of K passages go on, and side by side into the decoder.

Where a mesh spreads the passages of a question over devices (axis `passages`), this is the first
time that they meet: every device learns all scores, and then only kept passages travel, each to the
device that reads it on, so that Live-B and the decoder's keys and values are divided as well.
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
    """What the first live layers leave for the choice."""

    states: jax.Array  # [B, K, N, D]
    mask: jax.Array  # bool [B, K, N], real tokens of existing passages
    scores: jax.Array  # float32 [B, K], -inf where there is no passage


def select(live: Live, num_kept: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The m best passages, in the retriever's order.

    Hard: no gradient goes through the choice. Ties go to the earlier passage. Spread over devices,
    m is filled up with masked passages to what they can share evenly.

    Args:
      live: states of all K passages and their scores.
      num_kept: m; None keeps all.

    Returns:
      States `[B, m', N, D]` and mask `[B, m', N]`, m' = m on one device, and int32 indices `[B, m]`
      into the K passages.

    Raises:
      ValueError: m is more than K.
    """
    num_passages = live.scores.shape[1]
    if num_kept is None or num_kept == num_passages:
        kept = jnp.broadcast_to(jnp.arange(num_passages), live.scores.shape)
        return live.states, live.mask, kept
    if num_kept > num_passages:
        raise ValueError(
            f"num_kept={num_kept} passages cannot be kept of {num_passages} retrieved ones. Retrieve "
            "more (TASK_FEATURE_LENGTHS' K) or keep fewer (num_kept)."
        )
    scores = constrain(jax.lax.stop_gradient(live.scores), (axes.BATCH, None))
    _, kept = jax.lax.top_k(scores, num_kept)
    kept = jnp.sort(kept, axis=1)
    ways = partitioning.parts_in_scope(axes.PASSAGES)
    # What does not divide evenly is no batch but the one row that parameters are made from.
    if ways > 1 and len(kept) % partitioning.parts_in_scope(axes.BATCH) == 0:
        return *_gather_spread(live, kept, ways), kept
    states = jnp.take_along_axis(live.states, kept[:, :, None, None], axis=1)
    mask = jnp.take_along_axis(live.mask, kept[:, :, None], axis=1)
    return states, mask, kept


def _gather_spread(live: Live, kept_BM: jax.Array, ways: int) -> tuple[jax.Array, jax.Array]:
    """Kept passages, dealt to the devices that had all of them."""
    filled = -kept_BM.shape[1] % ways
    # Nobody's passage: it comes out as zeros, masked.
    kept_BM = jnp.pad(kept_BM, ((0, 0), (0, filled)), constant_values=live.scores.shape[1])
    names = (_STATES, _MASK, (axes.BATCH, None))
    specs = [partitioning.spec(one) for one in names]
    gather = jax.shard_map(
        functools.partial(_gather_own, axis=partitioning.AXIS_RULES[axes.PASSAGES]),
        in_specs=tuple(specs),
        out_specs=tuple(specs[:2]),
    )
    return gather(live.states, live.mask, kept_BM)


def _gather_own(states, mask, kept_BM, axis):
    """One device's part: what it holds of the kept passages, scattered to the others.

    A sum in which all terms but one are zero, so nothing is rounded.
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
    """Kept passages side by side: `[B, M, N, D]`, `[B, M, N]` -> `[B, M*N, D]`, `[B, M*N]`."""
    batch, kept, length, dim = states.shape
    return states.reshape(batch, kept * length, dim), mask.reshape(batch, kept * length)
