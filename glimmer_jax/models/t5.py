"""T5 (arXiv 1910.10683), v1.1 and 1.0: its configuration, its layers, and stacks of them.

Pre-norm residual blocks, RMSNorm, gated GELU (1.0: ReLU, not gated), a relative position bias shared
by the layers of a stack, unscaled attention, no biases, an output layer of its own (1.0: the
embedding, with logits scaled by D^-0.5). Names of parameters are T5X's. A stack is either scanned (one
set of parameters with a leading layer axis, compiled once whatever the depth) or looped
(`layers_0`, `layers_1`, ...); `stack_layers` and `unstack_layers` move between the two.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax import axes
from glimmer_jax.nn.attention import Attention
from glimmer_jax.nn.layers import (
    ACTIVATIONS,
    Dense,
    Dropout,
    MlpBlock,
    RMSNorm,
    activation_names,
    project,
)
from glimmer_jax.nn.relative_position import RelativePositionBias
from glimmer_jax.partitioning import constrain

REMAT_POLICIES = {
    # Recompute everything from the layer's input.
    "full": None,
    # Keep the results of the projections, recompute what is between them.
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics of one T5. Field names are T5X's."""

    vocab_size: int  # V, rows of the embedding, padding to a round number included
    emb_dim: int  # D, width of the residual stream
    num_heads: int  # H
    head_dim: int  # C, channels of a head; H * C need not be D
    mlp_dim: int  # F, width of the gated feed-forward
    num_encoder_layers: int  # L, memory and live layers together
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")  # one projection for each, multiplied
    dropout_rate: float = 0.0  # active only where a dropout stream is given
    dtype: str = "float32"  # of activations and matrix products; parameters are always float32
    matmul_dtype: str | None = None  # of the operands of projections alone; results keep `dtype`
    scan_layers: bool = True
    remat_policy: str = "none"  # none, minimal or full
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    tie_output: bool = False  # T5 1.0: the output layer is the embedding, logits scaled by D^-0.5

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim")
        for name in (*sizes, "num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.")
        if self.matmul_dtype not in (None, "bfloat16"):
            raise ValueError(f"matmul_dtype must be None or 'bfloat16', got {self.matmul_dtype!r}.")
        if self.remat_policy not in ("none", *REMAT_POLICIES):
            raise ValueError(
                f"remat_policy must be one of none, {', '.join(REMAT_POLICIES)}; "
                f"got {self.remat_policy!r}."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}.")
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise ValueError(
                f"mlp_activations must be names out of {sorted(ACTIVATIONS)}; "
                f"got {self.mlp_activations}."
            )

    @property
    def operands(self) -> Any:
        """`matmul_dtype` as a dtype, or None."""
        return None if self.matmul_dtype is None else jnp.dtype(self.matmul_dtype)


def _attention(config: T5Config) -> Attention:
    return Attention(
        emb_dim=config.emb_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
        operands=config.operands,
    )


def _mlp(config: T5Config) -> MlpBlock:
    return MlpBlock(
        mlp_dim=config.mlp_dim,
        activations=config.mlp_activations,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
        operands=config.operands,
    )


def _residual(x: jax.Array) -> jax.Array:
    return constrain(x, activation_names(x.ndim, axes.ACT_EMBED))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each on a normed copy added back to the stream."""

    config: T5Config

    def setup(self):
        dtype = jnp.dtype(self.config.dtype)
        self.pre_attention_layer_norm = RMSNorm(dtype)
        self.attention = _attention(self.config)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = _mlp(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        """`[..., N, D]` with a key mask `[..., 1, 1, N]` and a bias `[H, N, N]`."""
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, self.attention.keys_values(y), mask, bias)
        x = _residual(x + self.dropout(y))
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return _residual(x + self.dropout(y)), None


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention, feed-forward.

    The two ways through a layer, a whole target at once (`__call__`) and one token with a cache
    (`step`), share every line that computes.
    """

    config: T5Config

    def setup(self):
        dtype = jnp.dtype(self.config.dtype)
        self.pre_self_attention_layer_norm = RMSNorm(dtype)
        self.self_attention = _attention(self.config)
        self.pre_cross_attention_layer_norm = RMSNorm(dtype)
        self.encoder_decoder_attention = _attention(self.config)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = _mlp(self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def _cross_and_mlp(self, x, cross_keys_values, cross_mask):
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, cross_keys_values, cross_mask)
        x = _residual(x + self.dropout(y))
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return _residual(x + self.dropout(y))

    def __call__(self, x, encoded, cross_mask, self_mask, bias):
        """Targets `[..., T, D]` over encoder states `[..., S, D]`."""
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, self.self_attention.keys_values(y), self_mask, bias)
        x = _residual(x + self.dropout(y))
        keys_values = self.encoder_decoder_attention.keys_values(encoded)
        return self._cross_and_mlp(x, keys_values, cross_mask), None

    def cross_keys_values(self, carry, encoded):
        """Keys and values of the encoder states, once a question: each `[B, S, H, C]`."""
        return carry, self.encoder_decoder_attention.keys_values(encoded)

    def step(self, x, cache, cross_keys_values, cross_mask, self_mask, bias, index):
        """One token of every beam, `[B, W, D]`, at position `index` of the cache.

        Beams are a batch for self-attention, and queries of one sequence for cross-attention: the
        encoder's keys and values are read once and never copied for each beam.
        """
        y = self.pre_self_attention_layer_norm(x)[:, :, None]
        new = self.self_attention.keys_values(y)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), index, axis=2)
            for old, fresh in zip(cache, new, strict=True)
        )
        y = self.self_attention(y, cache, self_mask, bias)[:, :, 0]
        return self._cross_and_mlp(x + y, cross_keys_values, cross_mask), cache


def _rematted(layer_cls: Any, config: T5Config) -> Any:
    if config.remat_policy == "none":
        return layer_cls
    return nn.remat(
        layer_cls,
        policy=REMAT_POLICIES[config.remat_policy],
        # Inside a scan the compiler cannot merge the two computations anyway.
        prevent_cse=not config.scan_layers,
    )


def _scan_kwargs(num_layers: int, in_axes: tuple[Any, ...]) -> dict[str, Any]:
    return dict(
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )


class EncoderStack(nn.Module):
    """Encoder layers without position bias or final norm; none at all is a legal number."""

    config: T5Config
    num_layers: int

    def setup(self):
        layer_cls = _rematted(EncoderLayer, self.config)
        if self.num_layers and self.config.scan_layers:
            kwargs = _scan_kwargs(self.num_layers, (nn.broadcast, nn.broadcast))
            self.layers = nn.scan(layer_cls, **kwargs)(self.config)
        else:
            self.layers = [layer_cls(self.config) for _ in range(self.num_layers)]

    def __call__(self, x: jax.Array, key_mask: jax.Array, bias: jax.Array | None) -> jax.Array:
        """`[..., N, D]`, bool key mask `[..., N]`, float32 bias `[H, N, N]` -> `[..., N, D]`."""
        mask = key_mask[..., None, None, :]
        if self.num_layers == 0:
            return x
        if self.config.scan_layers:
            return self.layers(x, mask, bias)[0]
        for layer in self.layers:
            x, _ = layer(x, mask, bias)
        return x


@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding carries from token to token, and what it only reads.

    keys, values: one `[B, W, T, H, C]` for each layer (stacked on a leading axis if scanned); of the
      tokens so far.
    """

    keys: Any
    values: Any


jax.tree_util.register_dataclass(Cache, data_fields=["keys", "values"], meta_fields=[])


class Decoder(nn.Module):
    """Decoder layers, their position bias, the final norm and the output projection."""

    config: T5Config

    def setup(self):
        config = self.config
        layer_cls = _rematted(DecoderLayer, config)
        self.relpos_bias = position_bias(config, bidirectional=False)
        if config.scan_layers:
            broadcast = nn.broadcast
            n = config.num_decoder_layers
            self.layers = nn.scan(
                layer_cls,
                methods={
                    "__call__": _scan_kwargs(n, (broadcast,) * 4),
                    "cross_keys_values": _scan_kwargs(n, (broadcast,)),
                    "step": _scan_kwargs(n, (0, 0, *(broadcast,) * 4)),
                },
            )(config)
        else:
            self.layers = [layer_cls(config) for _ in range(config.num_decoder_layers)]
        self.decoder_norm = RMSNorm(jnp.dtype(config.dtype))
        self.dropout = Dropout(config.dropout_rate)
        # float32 logits: the softmax over V is taken of them, in the loss and in decoding.
        if not config.tie_output:
            names = (axes.EMBED, axes.VOCAB)
            self.logits_dense = Dense(config.vocab_size, names, jnp.float32, config.operands)

    def _logits(self, x: jax.Array, embedding: jax.Array | None) -> jax.Array:
        x = self.dropout(self.decoder_norm(x))
        if embedding is None:
            logits = self.logits_dense(x)
        else:
            x = x.astype(jnp.float32) * self.config.emb_dim**-0.5
            operands = self.config.operands
            product = jnp.dot if operands is None else functools.partial(project, operands=operands)
            logits = product(x, embedding.T)
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
          key_mask: bool `[..., S]`, the encoder positions that exist.
          embedding: `[V, D]`, given where it is the output layer (`tie_output`).
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
        """Keys and values of all layers for encoder states `[B, S, D]`, computed once."""
        if self.config.scan_layers:
            return self.layers.cross_keys_values((), encoded)[1]
        return [layer.cross_keys_values((), encoded)[1] for layer in self.layers]

    def empty_cache(self, batch: int, beams: int, length: int) -> Cache:
        """A cache of zeros for targets of up to `length` tokens."""
        config = self.config
        shape: tuple[int, ...] = (batch, beams, length, config.num_heads, config.head_dim)
        if config.scan_layers:
            zeros: Any = jnp.zeros((config.num_decoder_layers, *shape), config.dtype)
        else:
            zeros = [jnp.zeros(shape, config.dtype) for _ in range(config.num_decoder_layers)]
        return Cache(keys=zeros, values=zeros)

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

        Raises nothing; `index` beyond the cache would silently overwrite its last position, so
        the caller's loop is bounded by the cache's length.
        """
        scanned = self.config.scan_layers
        length = jax.tree.leaves(cache)[0].shape[-3]
        bias = jax.lax.dynamic_slice_in_dim(self.relpos_bias(length, length), index, 1, axis=1)
        self_mask = (jnp.arange(length) <= index)[None, None, None, None]
        args = (key_mask[:, None, None, :], self_mask, bias, index)
        if scanned:
            x, (keys, values) = self.layers.step(
                x, (cache.keys, cache.values), cross_keys_values, *args
            )
            return self._logits(x, embedding), Cache(keys, values)
        keys, values = [], []
        layers = zip(self.layers, cache.keys, cache.values, cross_keys_values, strict=True)
        for layer, key, value, cross in layers:
            x, (key, value) = layer.step(x, (key, value), cross, *args)
            keys.append(key)
            values.append(value)
        return self._logits(x, embedding), Cache(keys, values)


def position_bias(config: T5Config, *, bidirectional: bool) -> RelativePositionBias:
    """The position table of one stack."""
    return RelativePositionBias(
        num_heads=config.num_heads,
        num_buckets=config.relpos_buckets,
        max_distance=config.relpos_max_distance,
        bidirectional=bidirectional,
    )


def stack_layers(tree: dict[str, Any]) -> dict[str, Any]:
    """`layers_0 ... layers_{n-1}` anywhere in a tree -> one `layers` with a leading axis."""
    out = {k: stack_layers(v) if isinstance(v, dict) else v for k, v in tree.items()}
    numbered = [f"layers_{i}" for i in range(len(out)) if f"layers_{i}" in out]
    if numbered:
        layers = [out.pop(name) for name in numbered]
        out["layers"] = jax.tree.map(_stack, *layers)
    return out


def _stack(*leaves: Any) -> Any:
    # What lies on the host stays there: a device would have to hold all of it.
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        return np.stack(leaves)
    return jnp.stack(leaves)


def unstack_layers(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    out = {k: unstack_layers(v) if isinstance(v, dict) else v for k, v in tree.items()}
    if "layers" in out:
        layers = out.pop("layers")
        for i in range(jax.tree.leaves(layers)[0].shape[0]):
            out[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
    return out
