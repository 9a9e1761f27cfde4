"""T5's decoder, and FiDO's (arXiv 2212.08153) with sparse cross-attention and larger layers.

With `cross_attention_period` p only every p-th layer attends to the passages. Cross-attention keys
and values are computed once per question and shared by all beams.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes
from glimmer_jax.models.t5 import (
    T5Config,
    attention,
    mlp,
    position_bias,
    rematted,
    residual,
    scan_kwargs,
)
from glimmer_jax.nn.layers import Dense, Dropout, RMSNorm, activation_names, project
from glimmer_jax.partitioning import constrain


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention if the layer attends, feed-forward.

    Teacher forcing (`__call__`) and decoding with a cache (`step`) share the same submodules.
    """

    config: T5Config
    attends: bool = True

    def setup(self):
        config, sizes = self.config, self.config.decoder_sizes
        dtype = jnp.dtype(config.dtype)
        self.pre_self_attention_layer_norm = RMSNorm(dtype)
        self.self_attention = attention(sizes, config)
        if self.attends:
            self.pre_cross_attention_layer_norm = RMSNorm(dtype)
            self.encoder_decoder_attention = attention(sizes, config)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = mlp(sizes, config)
        self.dropout = Dropout(config.dropout_rate)

    def _cross_and_mlp(self, x, cross_keys_values, cross_mask):
        if self.attends:
            y = self.pre_cross_attention_layer_norm(x)
            y = self.encoder_decoder_attention(y, cross_keys_values, cross_mask)
            x = residual(x + self.dropout(y))
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return residual(x + self.dropout(y))

    def __call__(self, x, encoded, cross_mask, self_mask, bias):
        """Targets `[..., T, D]` over encoder states `[..., S, D]`."""
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, self.self_attention.keys_values(y), self_mask, bias)
        x = residual(x + self.dropout(y))
        keys_values = self.encoder_decoder_attention.keys_values(encoded) if self.attends else None
        return self._cross_and_mlp(x, keys_values, cross_mask), None

    def cross_keys_values(self, carry, encoded):
        """Keys and values of the encoder states, each `[B, G, S, C]`; None without cross-attention."""
        if not self.attends:
            return carry, None
        # Heads first, as the products read them: otherwise every token would transpose them again.
        keys_values = self.encoder_decoder_attention.keys_values(encoded)
        return carry, tuple(jnp.swapaxes(x, 1, 2) for x in keys_values)

    def step(self, x, cache, cross_keys_values, cross_mask, self_mask, bias, index):
        """One token of every beam, `[B, W, D]`, at position `index` of the cache.

        Beams are a batch dimension in self-attention and queries of one sequence in cross-attention,
        so that all beams read the same keys and values of the encoder.
        """
        y = self.pre_self_attention_layer_norm(x)[:, :, None]
        new = self.self_attention.keys_values(y)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), index, axis=2)
            for old, fresh in zip(cache, new, strict=True)
        )
        y = self.self_attention(y, cache, self_mask, bias)[:, :, 0]
        if self.attends:
            cross_keys_values = tuple(jnp.swapaxes(x, 1, 2) for x in cross_keys_values)
        return self._cross_and_mlp(x + y, cross_keys_values, cross_mask), cache


class DecoderBlock(nn.Module):
    """One period of layers, the last of which attends: the unit of the scan."""

    config: T5Config

    def setup(self):
        period = self.config.cross_attention_period
        self.block = [DecoderLayer(self.config, self.config.attends(i)) for i in range(period)]

    def __call__(self, x, *args):
        for layer in self.block:
            x, _ = layer(x, *args)
        return x, None

    def cross_keys_values(self, carry, encoded):
        """Keys and values of the block's cross-attention layer, for `nn.scan`."""
        return self.block[-1].cross_keys_values(carry, encoded)

    def step(self, x, cache, cross_keys_values, *args):
        """The cache holds (keys, values) of each layer of the block."""
        caches = []
        for layer, layer_cache in zip(self.block, cache, strict=True):
            x, layer_cache = layer.step(x, layer_cache, cross_keys_values, *args)
            caches.append(layer_cache)
        return x, tuple(caches)


# Self-attention keys and values of the tokens decoded so far: (keys, values), each `[B, W, T, G, C]`,
# per layer. Scanned layers are stacked on a leading axis, with one pair per layer of a block.
Cache = Any


class Decoder(nn.Module):
    """Decoder layers, their position bias, the final norm and the output projection."""

    config: T5Config

    def setup(self):
        config = self.config
        n, period = config.num_decoder_layers, config.cross_attention_period
        self.relpos_bias = position_bias(config, bidirectional=False)
        if config.scan_layers:
            broadcast = nn.broadcast
            unit = DecoderLayer if period == 1 else DecoderBlock
            self.layers = nn.scan(
                rematted(unit, config),
                methods={
                    "__call__": scan_kwargs(n // period, (broadcast,) * 4),
                    "cross_keys_values": scan_kwargs(n // period, (broadcast,)),
                    "step": scan_kwargs(n // period, (0, 0, *(broadcast,) * 4)),
                },
            )(config)
        else:
            layer_cls = rematted(DecoderLayer, config)
            self.layers = [layer_cls(config, config.attends(i)) for i in range(n)]
        self.decoder_norm = RMSNorm(jnp.dtype(config.dtype))
        self.dropout = Dropout(config.dropout_rate)
        # float32 logits, for the softmax over V in the loss and in decoding.
        if not config.tie_output:
            names = (axes.EMBED, axes.VOCAB)
            self.logits_dense = Dense(config.vocab_size, names, jnp.float32, config.operands)

    def _logits(self, x: jax.Array, embedding: jax.Array | None) -> jax.Array:
        x = self.dropout(self.decoder_norm(x))
        if embedding is None:
            logits = self.logits_dense(x)
        else:
            x = x.astype(jnp.float32) * self.config.emb_dim**-0.5
            operands = jnp.dtype(self.config.operands or jnp.float32)
            logits = project(x, embedding.T, (axes.EMBED, axes.VOCAB), operands)
        return constrain(logits, activation_names(logits.ndim, axes.ACT_VOCAB))

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        key_mask: jax.Array,
        embedding: jax.Array | None = None,
    ) -> jax.Array:
        """Embedded targets `[..., T, D]` -> float32 logits `[..., T, V]`.

        Args:
          x: embedded decoder input tokens.
          encoded: encoder states `[..., S, D]`.
          key_mask: bool `[..., S]`, existing encoder positions.
          embedding: `[V, D]` if it is the output layer (`tie_output`).
        """
        length = x.shape[-2]
        causal = jnp.tril(jnp.ones((length, length), bool))
        self_mask = jnp.reshape(causal, (1,) * (x.ndim - 1) + causal.shape)
        args = (encoded, key_mask[..., None, None, :], self_mask, self.relpos_bias(length, length))
        if self.config.scan_layers:
            x, _ = self.layers(x, *args)
        else:
            for layer in self.layers:
                x, _ = layer(x, *args)
        return self._logits(x, embedding)

    def cross_keys_values(self, encoded: jax.Array) -> Any:
        """Keys and values of encoder states `[B, S, D]`, for all layers that attend."""
        if self.config.scan_layers:
            return self.layers.cross_keys_values((), encoded)[1]
        return [layer.cross_keys_values((), encoded)[1] for layer in self.layers]

    def empty_cache(self, batch: int, beams: int, length: int) -> Cache:
        """A cache of zeros for targets of up to `length` tokens."""
        config, sizes = self.config, self.config.decoder_sizes
        shape: tuple[int, ...] = (batch, beams, length, sizes.num_kv_heads, sizes.head_dim)
        n, period = config.num_decoder_layers, config.cross_attention_period
        if config.scan_layers:
            shape = (n // period, *shape)
        pair = (jnp.zeros(shape, config.dtype),) * 2
        if config.scan_layers:
            return pair if period == 1 else (pair,) * period
        return [pair] * n

    def step(
        self,
        x: jax.Array,
        index: jax.Array,
        cache: Cache,
        cross_keys_values: Any,
        key_mask: jax.Array,
        embedding: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """One token of every beam: embedded `[B, W, D]` at position `index` -> logits `[B, W, V]`.

        The caller bounds `index` by the length of the cache: an index beyond it would overwrite the
        last position.
        """
        length = jax.tree.leaves(cache)[0].shape[-3]
        bias = jax.lax.dynamic_slice_in_dim(self.relpos_bias(length, length), index, 1, axis=1)
        self_mask = (jnp.arange(length) <= index)[None, None, None, None]
        args = (key_mask[:, None, None, :], self_mask, bias, index)
        if self.config.scan_layers:
            x, cache = self.layers.step(x, cache, cross_keys_values, *args)
            return self._logits(x, embedding), cache
        caches = []
        for layer, layer_cache, cross in zip(self.layers, cache, cross_keys_values, strict=True):
            x, layer_cache = layer.step(x, layer_cache, cross, *args)
            caches.append(layer_cache)
        return self._logits(x, embedding), caches
