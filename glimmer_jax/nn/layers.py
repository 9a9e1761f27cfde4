"""T5's small layers: projection, embedding, RMSNorm, gated feed-forward, dropout.

Parameters are float32 and are cast to the activations' dtype where they are used. No biases anywhere
(T5, arXiv 1910.10683; v1.1's gated GELU from arXiv 2002.05202). Leading dimensions are free: what is
written `[..., N, D]` takes `[B, N, D]` and `[B, K, N, D]` alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes
from glimmer_jax.partitioning import FREE, constrain

Dtype = Any
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # tanh approximation: T5 v1.1 was trained with it ("gelu_new" elsewhere).
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "linear": lambda x: x,
}


def activation_names(ndim: int, last: str | None) -> tuple[Any, ...]:
    """Names of an activation `[B, ..., last]`: batch first, features last.

    What is between lies as in the arrays it is made of: the passages of a question, and the tokens
    of all kept passages, may be spread over devices, and `models.glimmer` says where they are.
    """
    return (axes.BATCH, *(FREE,) * (ndim - 2), last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, kernel: jax.Array, operands: Dtype) -> jax.Array:
    """`x @ kernel` with operands rounded to `operands` and a float32 result, also in its gradient.

    What a TPU does with float32 inputs by default. On a CPU with bfloat16 dot products it halves
    the time, where bfloat16 results would cost a conversion around every other operation.

    Args:
      x: float32 `[..., in]`.
      kernel: float32 `[in, out]`.
      operands: dtype of the operands.

    Returns:
      float32 `[..., out]`.
    """
    return jnp.dot(x.astype(operands), kernel.astype(operands), preferred_element_type=jnp.float32)


def _project_forward(x, kernel, operands):
    x, kernel = x.astype(operands), kernel.astype(operands)
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32), (x, kernel)


def _project_backward(operands, saved, gradient):
    # Written out, because the derived gradient would multiply float32 by bfloat16.
    x, kernel = saved
    gradient = gradient.astype(operands)
    flat = gradient.reshape(-1, gradient.shape[-1])
    return (
        jnp.dot(gradient, kernel.T, preferred_element_type=jnp.float32),
        jnp.dot(x.reshape(-1, x.shape[-1]).T, flat, preferred_element_type=jnp.float32),
    )


project.defvjp(_project_forward, _project_backward)


def by_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """`[..., in]` times `[out, in]`, transposed -> float32 `[..., out]`; for one row `x` on a CPU.

    XLA's CPU backend multiplies one row in float32 alone. It widens the kernel while it reads it,
    if both stand together; left to itself it moves the widening out of the loop over tokens, and
    each token then reads float32. The barrier makes the kernel look like something of this token.
    """
    x, rows = jax.lax.optimization_barrier((x, rows))
    y = jnp.dot(
        x.reshape(-1, x.shape[-1]).astype(rows.dtype), rows.T, preferred_element_type=jnp.float32
    )
    return y.reshape(*x.shape[:-1], -1)


class Dense(nn.Module):
    """A projection of the last dimension, without bias.

    In place of its `kernel`, `[in, out]`, it takes the same numbers as `rows`, `[out, in]`, of any
    float dtype: so a CPU reads them fastest where there is one row to multiply (`serving.prepare`).
    """

    features: int
    names: tuple[str, str]  # axis names of the kernel's two dimensions
    dtype: Dtype
    operands: Dtype = None  # of the product alone, where that is less than `dtype`
    init_scale: float = 1.0  # variance of outputs over variance of inputs at the start

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
        if self.operands is not None:
            return project(x.astype(jnp.float32), kernel, self.operands).astype(self.dtype)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


class Embed(nn.Module):
    """Token embedding, `[V, D]`, which may be the output layer as well."""

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
    """Scales by the root mean square over D; no mean is subtracted and there is no offset."""

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
    """Dropout that is on exactly when a `dropout` random stream is given to `apply`.

    One mask serves all positions of a sequence (dimension -2), as in T5X: it costs N times fewer
    random numbers, and those are not cheap on a CPU or a TPU.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        return nn.Dropout(self.rate, broadcast_dims=(-2,), deterministic=False)(x)


class MlpBlock(nn.Module):
    """Feed-forward: the product of one projection for each activation, projected back."""

    mlp_dim: int
    activations: Sequence[str]
    dropout_rate: float
    dtype: Dtype
    operands: Dtype = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., N, D]` -> `[..., N, D]`."""
        # T5X calls the only projection `wi`, and those of a gated block `wi_0`, `wi_1`.
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
