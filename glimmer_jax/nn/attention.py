"""T5's multi-head attention: logits without 1/sqrt(C), plus a position bias."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes
from glimmer_jax.nn import cudnn_attention, tpu_attention
from glimmer_jax.nn.layers import Dense, Dropout, activation_names
from glimmer_jax.partitioning import constrain, without_fsdp

# Value of masked logits. Finite, so that a query without any key gives zeros, not NaN.
MASKED = -1e30
# Kernels of self-attention: `(query, key, value, key_mask, bias, keep) -> [..., N, H, C]`.
FUSED: dict[str, Callable[..., jax.Array]] = {
    "cudnn": cudnn_attention.attend,
    "tpu": tpu_attention.attend,
}
# From this many keys on, a TPU pads a single query of a key head to two.
MANY_KEYS = 128


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Unscaled dot-product attention.

    Args:
      query: `[..., X, H, C]`, any float dtype.
      key: `[..., Y, G, C]`; G divides H, and each key head serves H / G consecutive query heads.
      value: `[..., Y, G, C]`.
      mask: bool, broadcastable to `[..., H, X, Y]`; False keys are ignored.
      bias: float32 `[..., H, X, Y]`, added to the logits.
      dropout: applied to the weights.

    Returns:
      `[..., X, H, C]` in the dtype of `value`; zeros for a query without any key.
    """
    rows = query.shape[-3] * query.shape[-2] // key.shape[-2]  # that share a key head
    if rows != 1 or key.shape[-3] < MANY_KEYS:
        return _attend(query, key, value, mask, bias, dropout)

    def padded(query, key, value):
        pad = [(0, 0)] * query.ndim
        pad[-3] = (0, 1)
        return _attend(jnp.pad(query, pad), key, value, mask, bias, dropout)[..., :1, :, :]

    def plain(query, key, value):
        return _attend(query, key, value, mask, bias, dropout)

    # A TPU computes products with a single row on its vector unit; with two rows the matrix unit is
    # used, and reading the keys and values is the only cost.
    return jax.lax.platform_dependent(query, key, value, tpu=padded, default=plain)


def _attend(query, key, value, mask, bias, dropout):
    # float32 logits and softmax: T5's logits are unscaled and exceed the precision of bfloat16.
    num_heads, groups = query.shape[-2], key.shape[-2]
    grouped = query.reshape(*query.shape[:-2], groups, num_heads // groups, query.shape[-1])
    logits = jnp.einsum("...xgrc,...ygc->...grxy", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(*logits.shape[:-4], num_heads, *logits.shape[-2:])
    if bias is not None:
        logits = logits + jnp.expand_dims(bias, tuple(range(logits.ndim - bias.ndim)))
    logits = jnp.where(mask, logits, MASKED)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout is not None:
        weights = dropout(weights)
    weights = weights.reshape(*weights.shape[:-3], groups, -1, *weights.shape[-2:])
    out = jnp.einsum(
        "...grxy,...ygc->...grxc",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    # Divide here, by C numbers per query instead of Y. Transpose here as well: as part of the product
    # it would keep a CPU from its fast kernel.
    out = out.reshape(*out.shape[:-4], num_heads, *out.shape[-2:])
    out = (out / jnp.where(total > 0, total, 1.0)).astype(value.dtype)
    return jnp.swapaxes(out, -3, -2)


class Attention(nn.Module):
    """Projections around `attend`; kernels are `[D, H*C]` and `[H*C, D]` as in T5X."""

    emb_dim: int
    num_heads: int
    num_kv_heads: int  # fewer than `num_heads`: multi-query (1) or grouped-query attention
    head_dim: int
    dropout_rate: float
    dtype: Any
    operands: Any = None  # dtype of the projections' operands; None is `dtype`
    kernel: str = "plain"  # or a fused one for self-attention: a key of `FUSED`

    def setup(self):
        joined = self.num_heads * self.head_dim
        names = (axes.EMBED, axes.JOINED_KV)
        # T5 folds the missing 1/sqrt(C) into the initialisation of the query projection.
        self.query = Dense(joined, names, self.dtype, self.operands, 1.0 / self.head_dim)
        # Too few key heads to shard: each device holds all of them.
        grouped = self.num_kv_heads < self.num_heads
        kv = (self.num_kv_heads * self.head_dim, (axes.EMBED, axes.KV) if grouped else names)
        self.key = Dense(*kv, self.dtype, self.operands)
        self.value = Dense(*kv, self.dtype, self.operands)
        self.out = Dense(self.emb_dim, (axes.JOINED_KV, axes.EMBED), self.dtype, self.operands)
        self.dropout = Dropout(self.dropout_rate)

    def _split_heads(self, x: jax.Array, num_heads: int) -> jax.Array:
        x = x.reshape(*x.shape[:-1], num_heads, self.head_dim)
        heads = axes.ACT_HEADS if num_heads == self.num_heads else None
        return constrain(x, (*activation_names(x.ndim - 1, heads), axes.ACT_KV))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[..., Y, D]` -> keys and values, each `[..., Y, G, C]`."""
        n = self.num_kv_heads
        return self._split_heads(self.key(x), n), self._split_heads(self.value(x), n)

    def read(
        self,
        x: jax.Array,
        states: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """`self(x, self.keys_values(states), mask, bias)` without computing keys and values.

        For few queries. A product of query and key is q.(W s) = (qW).s, and a weighted sum of values
        is the value projection of the weighted sum, so each head reads the states themselves. That
        takes 2 H·D multiply-adds per state, where keys and values take 2 D·G·C.

        Args:
          x: queries `[..., X, D]`.
          states: inputs of the key and value projections, `[..., Y, D]`.
          mask: see `attend`.
          bias: see `attend`.
        """
        groups, repeats = self.num_kv_heads, self.num_heads // self.num_kv_heads
        dim = states.shape[-1]

        def by_head(projection: Dense) -> jax.Array:
            kernel = projection.weights(dim).astype(self.dtype)
            kernel = constrain(kernel, without_fsdp(projection.names))
            return kernel.reshape(dim, groups, self.head_dim)

        query = self.query(x).reshape(*x.shape[:-1], groups, repeats, self.head_dim)
        query = jnp.einsum("...grc,dgc->...grd", query, by_head(self.key))
        query = query.reshape(*x.shape[:-1], self.num_heads, dim)
        one_head = states[..., None, :]
        out = attend(query, one_head, one_head, mask, bias, self.dropout)
        out = out.reshape(*x.shape[:-1], groups, repeats, dim)
        out = jnp.einsum("...grd,dgc->...grc", out, by_head(self.value))
        return self.out(out.reshape(*x.shape[:-1], -1))

    def __call__(
        self,
        x: jax.Array,
        keys_values: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Queries `[..., X, D]` against keys and values `[..., Y, G, C]` -> `[..., X, D]`.

        A fused kernel needs queries of the same sequence as the keys, a key mask `[..., 1, 1, Y]` and
        a bias.
        """
        query = self._split_heads(self.query(x), self.num_heads)
        if self.kernel == "plain":
            out = attend(query, *keys_values, mask, bias, self.dropout)
        else:
            # The same random numbers as for the weights of the plain path: one per head and key.
            keep = self.dropout(jnp.ones((*query.shape[:-3], self.num_heads, 1, query.shape[-3])))
            fused = FUSED[self.kernel]
            out = fused(query, *keys_values, mask[..., 0, 0, :], bias, keep[..., 0, :])
        return self.out(out.reshape(*out.shape[:-2], -1))
