"""T5 (arXiv 1910.10683), v1.1 and 1.0: configuration and encoder stacks.

Pre-norm residual blocks, RMSNorm, gated GELU (1.0: ReLU, not gated), one relative position bias per
stack, unscaled attention, no biases, a separate output layer (1.0: the embedding, with logits scaled
by D^-0.5). Parameter names are T5X's. A stack is either scanned (one set of parameters with a leading
layer axis, compiled once for any depth) or unrolled (`layers_0`, `layers_1`, ...); `stacking` converts
between the two.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes
from glimmer_jax.nn.attention import FUSED, Attention
from glimmer_jax.nn.layers import (
    ACTIVATIONS,
    Dropout,
    MlpBlock,
    RMSNorm,
    activation_names,
)
from glimmer_jax.nn.relative_position import RelativePositionBias
from glimmer_jax.partitioning import constrain

# Values that a layer keeps for its backward pass, in addition to its input; others are recomputed.
# From the least recomputation to the most: `preflight.nearest` proposes the policies in this order.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    # The results of projections.
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Sizes(NamedTuple):
    """Sizes that may differ between encoder and decoder; both share D and the vocabulary."""

    num_heads: int  # H
    num_kv_heads: int  # G, heads of keys and values, each for H / G query heads
    head_dim: int  # C
    mlp_dim: int  # F


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics of one T5. Field names are T5X's."""

    vocab_size: int  # V, rows of the embedding, including padding rows
    emb_dim: int  # D, width of the residual stream
    num_heads: int  # H
    head_dim: int  # C, channels of a head; H * C need not be D
    mlp_dim: int  # F, width of the gated feed-forward
    num_encoder_layers: int  # L, memory and live layers together
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")  # one projection each, multiplied
    dropout_rate: float = 0.0  # active only with a dropout stream
    dtype: str = "float32"  # of activations and matrix products; parameters are always float32
    matmul_dtype: str | None = None  # of projections' operands; results keep `dtype`
    scan_layers: bool = True
    remat_policy: str = "none"  # one of REMAT_POLICIES
    attention: str = "plain"  # of the encoder: plain, or a fused kernel: cudnn, tpu
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    # FiDO (arXiv 2212.08153): sparse cross-attention and a decoder larger than the encoder.
    cross_attention_period: int = 1  # every p-th decoder layer attends to the passages
    decoder_kv_heads: int | None = None  # heads of keys and values; 1 is multi-query, None all
    decoder_num_heads: int | None = None  # None: as the encoder
    decoder_head_dim: int | None = None  # None: as the encoder
    decoder_mlp_dim: int | None = None  # None: as the encoder
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
        if self.remat_policy not in REMAT_POLICIES:
            raise ValueError(
                f"remat_policy must be one of {', '.join(REMAT_POLICIES)}; "
                f"got {self.remat_policy!r}."
            )
        if self.attention not in ("plain", *FUSED):
            raise ValueError(
                f"attention must be one of plain, {', '.join(FUSED)}; got {self.attention!r}."
            )
        if self.attention == "cudnn" and (self.dtype != "bfloat16" or self.head_dim % 8):
            raise ValueError(
                "attention='cudnn' needs dtype='bfloat16' and head_dim to be a multiple of 8; got "
                f"dtype={self.dtype!r} and head_dim={self.head_dim}. Set ACTIVATION_DTYPE='bfloat16', or "
                "ATTENTION='plain'."
            )
        for name in ("kv_heads", "num_heads", "head_dim", "mlp_dim"):
            value = getattr(self, f"decoder_{name}")
            if value is not None and value < 1:
                raise ValueError(f"decoder_{name} must be None or at least 1, got {value}.")
        decoder = self.decoder_sizes
        if decoder.num_heads % decoder.num_kv_heads:
            raise ValueError(
                f"decoder_kv_heads={decoder.num_kv_heads} must divide the decoder's "
                f"{decoder.num_heads} heads."
            )
        period = self.cross_attention_period
        if not 1 <= period <= self.num_decoder_layers or self.num_decoder_layers % period:
            raise ValueError(
                f"cross_attention_period={period} must divide num_decoder_layers="
                f"{self.num_decoder_layers}: the last layer of each period attends to the passages."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}.")
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise ValueError(
                f"mlp_activations must be names from {sorted(ACTIVATIONS)}, got "
                f"{self.mlp_activations}."
            )

    def semantics(self) -> dict[str, Any]:
        """Fields that change what the same parameters compute, beyond rounding; for fingerprints."""
        names = (
            "num_heads",
            "head_dim",
            "mlp_activations",
            "relpos_buckets",
            "relpos_max_distance",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def encoder_sizes(self) -> Sizes:
        """Sizes of an encoder layer."""
        return Sizes(self.num_heads, self.num_heads, self.head_dim, self.mlp_dim)

    @property
    def decoder_sizes(self) -> Sizes:
        """Sizes of a decoder layer."""
        heads = self.decoder_num_heads or self.num_heads
        return Sizes(
            heads,
            self.decoder_kv_heads or heads,
            self.decoder_head_dim or self.head_dim,
            self.decoder_mlp_dim or self.mlp_dim,
        )

    def attends(self, layer: int) -> bool:
        """Whether decoder layer `layer`, counted from 0, has cross-attention."""
        return (layer + 1) % self.cross_attention_period == 0

    @property
    def operands(self) -> Any:
        """`matmul_dtype` as a dtype, or None."""
        return None if self.matmul_dtype is None else jnp.dtype(self.matmul_dtype)

    def kernel_dtype(self, module: str) -> Any:
        """The dtype to which the product of the projection of this name rounds its kernel."""
        if self.operands is not None:
            return self.operands
        return jnp.dtype(jnp.float32 if module == "logits_dense" else self.dtype)


def attention(sizes: Sizes, config: T5Config, kernel: str = "plain") -> Attention:
    """Attention of the encoder or the decoder."""
    return Attention(
        emb_dim=config.emb_dim,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
        operands=config.operands,
        kernel=kernel,
    )


def mlp(sizes: Sizes, config: T5Config) -> MlpBlock:
    """Feed-forward of the encoder or the decoder."""
    return MlpBlock(
        mlp_dim=sizes.mlp_dim,
        activations=config.mlp_activations,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.dtype),
        operands=config.operands,
    )


def residual(x: jax.Array) -> jax.Array:
    """Constrains the sharding of the residual stream `[..., D]`."""
    return constrain(x, activation_names(x.ndim, axes.ACT_EMBED))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward as pre-norm residual blocks."""

    config: T5Config

    def setup(self):
        dtype = jnp.dtype(self.config.dtype)
        self.pre_attention_layer_norm = RMSNorm(dtype)
        self.attention = attention(self.config.encoder_sizes, self.config, self.config.attention)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = mlp(self.config.encoder_sizes, self.config)
        self.dropout = Dropout(self.config.dropout_rate)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        """`[..., N, D]` with a key mask `[..., 1, 1, N]` and a bias `[H, N, N]`."""
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, self.attention.keys_values(y), mask, bias)
        x = residual(x + self.dropout(y))
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return residual(x + self.dropout(y)), None

    def at(self, x: jax.Array, position: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """The result of `__call__` at one position `[...]` of each sequence: `[..., D]`."""
        index = position[..., None, None]
        y = self.pre_attention_layer_norm(x)
        state, state_y = (jnp.take_along_axis(z, index, axis=-2) for z in (x, y))
        # [H, ..., N] -> [..., H, 1, N]
        bias = jnp.moveaxis(jnp.take(bias, position, axis=1), 0, -2)[..., None, :]
        state = residual(state + self.attention.read(state_y, y, mask, bias))
        state = residual(state + self.mlp(self.pre_mlp_layer_norm(state)))
        return state[..., 0, :]


def rematted(layer_cls: Any, config: T5Config) -> Any:
    """The layer class with the rematerialisation policy of the config."""
    if config.remat_policy == "none":
        return layer_cls
    return nn.remat(
        layer_cls,
        policy=REMAT_POLICIES[config.remat_policy],
        # Inside a scan the compiler cannot merge the recomputation with the forward pass.
        prevent_cse=not config.scan_layers,
    )


def scan_kwargs(num_layers: int, in_axes: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments of `nn.scan` over `num_layers` stacked layers."""
    return dict(
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )


class EncoderStack(nn.Module):
    """Encoder layers without position bias or final norm; `num_layers` may be 0."""

    config: T5Config
    num_layers: int

    def setup(self):
        layer_cls = rematted(EncoderLayer, self.config)
        if self.num_layers and self.config.scan_layers:
            kwargs = scan_kwargs(self.num_layers, (nn.broadcast, nn.broadcast))
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

    def below_last(self, x: jax.Array, key_mask: jax.Array, bias: jax.Array) -> jax.Array:
        """All layers but the last, of an unrolled stack; shapes as in `__call__`."""
        for layer in self.layers[:-1]:
            x, _ = layer(x, key_mask[..., None, None, :], bias)
        return x

    def last(self, x: jax.Array, key_mask: jax.Array, bias: jax.Array) -> jax.Array:
        """The last layer, applied to the result of `below_last`."""
        return self.layers[-1](x, key_mask[..., None, None, :], bias)[0]

    def last_at(
        self, x: jax.Array, position: jax.Array, key_mask: jax.Array, bias: jax.Array
    ) -> jax.Array:
        """The result of `last` at one position, int32 `[...]`, of each sequence: `[..., D]`."""
        return self.layers[-1].at(x, position, key_mask[..., None, None, :], bias)


def position_bias(config: T5Config, *, bidirectional: bool) -> RelativePositionBias:
    """The position bias of a stack; bidirectional for the encoder."""
    sizes = config.encoder_sizes if bidirectional else config.decoder_sizes
    return RelativePositionBias(
        num_heads=sizes.num_heads,
        num_buckets=config.relpos_buckets,
        max_distance=config.relpos_max_distance,
        bidirectional=bidirectional,
    )
