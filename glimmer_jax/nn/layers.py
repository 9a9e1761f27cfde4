"""T5's layers: projection, embedding, RMSNorm, gated feed-forward, dropout.

Parameters are float32 and are cast to the activations' dtype where they are used. There are no biases
(T5, arXiv 1910.10683; gated GELU of v1.1: arXiv 2002.05202). Leading dimensions are free: `[..., N, D]`
stands for `[B, N, D]` and `[B, K, N, D]` alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes
from glimmer_jax.partitioning import FREE, constrain, without_fsdp

Dtype = Any
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # tanh approximation, as T5 v1.1 was trained ("gelu_new" in Hugging Face).
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "linear": lambda x: x,
}


def activation_names(ndim: int, last: str | None) -> tuple[Any, ...]:
    """Dimension names of an activation `[B, ..., last]`: batch first, features last.

    The dimensions in between keep the sharding of their inputs: passages and the tokens of kept
    passages may be sharded, and `models.glimmer` constrains them.
    """
    return (axes.BATCH, *(FREE,) * (ndim - 2), last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: jax.Array, kernel: jax.Array, names: tuple[str, str], operands: Dtype) -> jax.Array:
    """`x @ kernel` with operands cast to `operands`, in the forward and the backward pass.

    On an fsdp mesh the kernel is gathered before each product. Left to itself, XLA's TPU compiler
    overlaps gather and product in a loop over shards ("windowed einsum") that rewrites the complete
    output in every iteration, many times slower than the gather. The backward pass gathers again,
    so that only the device's own shard is a residual.

    bfloat16 operands of float32 inputs are what a TPU computes by default. On a CPU with bfloat16
    dot products they halve the time, where bfloat16 results would cost conversions around every
    other operation.

    Args:
      x: `[..., in]`.
      kernel: `[in, out]`, in the dtype of `x`.
      names: dimension names of the kernel.
      operands: dtype of the operands.

    Returns:
      `[..., out]` in the dtype of `x`.
    """
    return _project_forward(x, kernel, names, operands)[0]


def _project_forward(x, kernel, names, operands):
    dtype, x, kernel = x.dtype, x.astype(operands), kernel.astype(operands)
    gathered = constrain(kernel, without_fsdp(names))
    return jnp.dot(x, gathered, preferred_element_type=dtype), (x, kernel)


def _project_backward(names, operands, residuals, gradient):
    # Explicit, because the derived gradient would multiply float32 by bfloat16.
    x, kernel = residuals
    dtype, gradient = gradient.dtype, gradient.astype(operands)
    gathered = constrain(kernel, without_fsdp(names))
    lead = tuple(range(x.ndim - 1))
    to_x = jax.lax.dot_general(
        gradient, gathered, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype
    )
    # In this order: XLA's CPU backend has no transposed bfloat16 product with a float32 result.
    to_kernel = jax.lax.dot_general(
        x, gradient, ((lead, lead), ((), ())), preferred_element_type=dtype
    )
    # Sum over the batch first, then shard: the compiler fuses both into a reduce-scatter.
    return to_x, constrain(constrain(to_kernel, without_fsdp(names)), names)


project.defvjp(_project_forward, _project_backward)


def by_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """`[..., in]` times the transpose of `[out, in]` -> float32 `[..., out]`; for single rows on a CPU.

    XLA's CPU backend computes products with one row in float32, and fuses the conversion of a
    bfloat16 kernel into the product if both are in the same computation. Without the barrier it
    would move the conversion out of the token loop, and every token would read a float32 kernel.
    """
    x, rows = jax.lax.optimization_barrier((x, rows))
    y = jnp.dot(
        x.reshape(-1, x.shape[-1]).astype(rows.dtype), rows.T, preferred_element_type=jnp.float32
    )
    return y.reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """A projection of the last dimension, without bias.

    The parameter is `kernel`, `[in, out]`, or its transpose `rows`, `[out, in]`, of any float dtype:
    the faster layout for a CPU that multiplies a single row (`serving.param_layout`).
    """

    features: int
    names: tuple[str, str]  # axis names of the kernel's two dimensions
    dtype: Dtype
    operands: Dtype = None  # dtype of the product's operands; None is `dtype`
    init_scale: float = 1.0  # initial variance of outputs over variance of inputs

    @nn.compact
    def weights(self, width: int) -> jax.Array:
        """The kernel, `[width, features]`."""
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        return self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.names),
            (width, self.features),
            jnp.float32,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` -> `[..., features]` in `dtype`."""
        if self.has_variable("params", "rows"):
            return by_rows(x, self.get_variable("params", "rows")).astype(self.dtype)
        kernel = self.weights(x.shape[-1])
        if self.operands is None:
            return project(
                x.astype(self.dtype), kernel.astype(self.dtype), self.names, jnp.dtype(self.dtype)
            )
        product = project(x.astype(jnp.float32), kernel, self.names, jnp.dtype(self.operands))
        return product.astype(self.dtype)


class Embed(nn.Module):
    """Token embedding, `[V, D]`; optionally also the output layer."""

    num_embeddings: int
    features: int
    dtype: Dtype

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), (axes.VOCAB, axes.EMBED)),
            (self.num_embeddings, self.features),
            jnp.float32,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 `[...]` -> `[..., D]` in `dtype`."""
        x = jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)
        return constrain(x, activation_names(x.ndim, axes.ACT_EMBED))

    def table(self) -> jax.Array:
        """The parameter itself, float32 `[V, D]`."""
        return self.embedding


class RMSNorm(nn.Module):
    """Divides by the root mean square over D and scales; no mean subtraction, no offset."""

    dtype: Dtype
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` -> `[..., D]` in `dtype`."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,)),
            (x.shape[-1],),
            jnp.float32,
        )
        # float32: the residual stream is large, and bfloat16 squares lose the small channels.
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.reshape(scale, (1,) * (x.ndim - 1) + (-1,))
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class Dropout(nn.Module):
    """Dropout, active if and only if `apply` gets a `dropout` random stream.

    All positions of a sequence (dimension -2) share one mask, as in T5X: this takes N times fewer
    random numbers, which are expensive on CPUs and TPUs.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        return nn.Dropout(self.rate, broadcast_dims=(-2,), deterministic=False)(x)


class MlpBlock(nn.Module):
    """Feed-forward: one projection per activation, multiplied elementwise and projected back."""

    mlp_dim: int
    activations: Sequence[str]
    dropout_rate: float
    dtype: Dtype
    operands: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., N, D]` -> `[..., N, D]`."""
        # T5X's names: `wi` of a plain block, `wi_0` and `wi_1` of a gated one.
        gated = len(self.activations) > 1
        factors = []
        for i, name in enumerate(self.activations):
            wi = Dense(
                self.mlp_dim,
                (axes.EMBED, axes.MLP),
                self.dtype,
                self.operands,
                name=f"wi_{i}" if gated else "wi",
            )
            factors.append(ACTIVATIONS[name](wi(x)))
        hidden = functools.reduce(jnp.multiply, factors)
        hidden = constrain(hidden, activation_names(hidden.ndim, axes.ACT_MLP))
        hidden = Dropout(self.dropout_rate)(hidden)
        out = Dense(x.shape[-1], (axes.MLP, axes.EMBED), self.dtype, self.operands, name="wo")
        return out(hidden)
