"""T5's relative position bias: one table per stack, shared by its layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax import axes


def buckets(
    query_length: int,
    key_length: int,
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> np.ndarray:
    """The bucket of every distance key - query (arXiv 1910.10683, section 2.1).

    Half of the buckets hold one small distance each. The other half grow logarithmically up to
    `max_distance`; all larger distances share the last bucket. Bidirectional stacks split the
    buckets between keys before and after the query.

    Returns:
      int32 `[query_length, key_length]`.
    """
    distance = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
    offset = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    num_exact = num_buckets // 2
    # float32 as in the original: rounding decides the bucket of distances at a boundary.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / num_exact) / np.log(
        np.float32(max_distance / num_exact)
    )
    logarithmic = num_exact + (ratio * (num_buckets - num_exact)).astype(np.int32)
    logarithmic = np.minimum(logarithmic, num_buckets - 1)
    return (offset + np.where(distance < num_exact, distance, logarithmic)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket, added to attention logits before the softmax."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    @nn.compact
    def __call__(self, query_length: int, key_length: int) -> jax.Array:
        """float32 `[H, query_length, key_length]`."""
        table = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                (axes.HEADS, axes.RELPOS_BUCKETS),
            ),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        )
        return jnp.take(
            table,
            buckets(
                query_length,
                key_length,
                bidirectional=self.bidirectional,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
            ),
            axis=1,
        )
