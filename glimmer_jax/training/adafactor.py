"""Adafactor (arXiv 1804.04235) with T5X's choices, factored by the names of dimensions.

The second moment of a matrix is stored as its row means and its column means. Logical names decide
which dimensions are rows and columns, so that a kernel `(embed, heads, kv)` or a scanned stack
`(layers, embed, mlp)` is factored as a matrix. Nothing is averaged over a `layers` dimension: each
layer has its own moments, update clipping and parameter scale, so that scanned and unrolled layers
train identically.

T5X applies its size threshold (128) to unrolled parameters only, so that its scanned narrow models
train differently. Here the threshold applies to both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from glimmer_jax import axes
from glimmer_jax.training.schedule import Schedule

ROW, COLUMN, LAYER, WHOLE = "row", "column", "layer", "whole"

# T5X's standard rules.
FACTOR_RULES: Mapping[str | None, str] = {
    axes.EMBED: ROW,
    axes.VOCAB: COLUMN,
    axes.MLP: COLUMN,
    axes.HEADS: COLUMN,
    axes.JOINED_KV: COLUMN,
    axes.KV: COLUMN,
    axes.RELPOS_BUCKETS: WHOLE,
    axes.LAYERS: LAYER,
    None: WHOLE,
}


@dataclasses.dataclass(frozen=True)
class Factors:
    """How a parameter is factored: its dimensions by role."""

    reduced: tuple[int, ...]  # all but layers; an RMS is taken over these
    rows: tuple[int, ...] = ()  # empty together with `columns`: not factored
    columns: tuple[int, ...] = ()

    @property
    def factored(self) -> bool:
        """Whether the second moment is factored."""
        return bool(self.rows)


class AdafactorState(NamedTuple):
    """Number of updates, and the moments: the parameters' tree with a dict of arrays at each leaf.

    A leaf is `{"row": ..., "column": ...}` (the parameter's shape without its columns, without its
    rows) or `{"full": ...}`, and `{"momentum": ...}` if momentum is used. All are float32.
    """

    count: Any  # type: ignore[assignment]  # optax's name; hides tuple.count
    moments: dict[str, Any]


def factor(names: tuple[str | None, ...], shape: tuple[int, ...], min_size: int) -> Factors:
    """Rows and columns of a parameter with these dimension names.

    Raises:
      ValueError: a name has no rule, or rows and columns are mixed with unfactored dimensions.
    """
    unknown = [name for name in names if name not in FACTOR_RULES]
    if unknown or len(names) != len(shape):
        raise ValueError(
            f"Adafactor cannot factor a parameter of shape {shape} with the dimension names {names}. "
            f"Known names are {[n for n in FACTOR_RULES if n]}. Add new names to "
            "adafactor.FACTOR_RULES."
        )
    roles = [FACTOR_RULES[name] for name in names]
    reduced = tuple(i for i, role in enumerate(roles) if role != LAYER)
    rows = tuple(i for i, role in enumerate(roles) if role == ROW)
    columns = tuple(i for i, role in enumerate(roles) if role == COLUMN)
    if not rows or not columns:
        return Factors(reduced)
    if WHOLE in roles:
        raise ValueError(
            f"Parameter dimensions {names} mix rows and columns with a dimension that is neither; "
            "give that dimension a row or column rule in adafactor.FACTOR_RULES."
        )
    if min(math.prod(shape[i] for i in dims) for dims in (rows, columns)) < min_size:
        return Factors(reduced)
    return Factors(reduced, rows, columns)


def adafactor(
    learning_rate: Schedule,
    names: dict[str, Any],
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    min_dim_size_to_factor: int = 128,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor for a nested dict of parameters with dimension names.

    Args:
      learning_rate: rate of update t = 0, 1, ...; relative to the parameter's RMS if scaled by it.
      names: tree of tuples: the dimension names of every parameter.
      decay_rate: c in the second moment's decay 1 - (t + 1)^-c.
      clipping_threshold: largest RMS of a parameter's update before scaling; None: no clipping.
      multiply_by_parameter_scale: scales each update by max(epsilon2, RMS of the parameter).
      epsilon1: added to squared gradients.
      epsilon2: smallest parameter scale.
      min_dim_size_to_factor: matrices with fewer rows or columns are not factored.
      momentum: decay of a running mean of updates; None: no momentum.
    """
    flat_names = flax.traverse_util.flatten_dict(names)

    def init(params: dict[str, Any]) -> AdafactorState:
        moments = {}
        for path, param in flax.traverse_util.flatten_dict(params).items():
            factors = factor(flat_names[path], param.shape, min_dim_size_to_factor)
            moments[path] = {
                key: jnp.zeros([param.shape[i] for i in dims], jnp.float32)
                for key, dims in _moment_dims(factors, param.ndim, momentum).items()
            }
        return AdafactorState(jnp.zeros((), jnp.int32), flax.traverse_util.unflatten_dict(moments))

    def update(grads: dict[str, Any], state: AdafactorState, params: dict[str, Any] | None = None):
        if params is None:
            raise ValueError("Adafactor scales updates by the parameters: pass `params` to update.")
        rate = learning_rate(state.count)
        decay = 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -decay_rate
        flat_params = flax.traverse_util.flatten_dict(params)
        updates, moments = {}, {}
        for path, grad in flax.traverse_util.flatten_dict(grads).items():
            param = flat_params[path]
            factors = factor(flat_names[path], param.shape, min_dim_size_to_factor)
            old = state.moments
            for key in path:
                old = old[key]
            step, new = precondition(grad.astype(jnp.float32), old, factors, decay, epsilon1)
            if clipping_threshold is not None:
                rms = _rms(step, factors.reduced)
                step = step / jnp.maximum(1.0, rms / clipping_threshold)
            if multiply_by_parameter_scale:
                step = step * jnp.maximum(_rms(param, factors.reduced), epsilon2)
            step = -rate * step
            if momentum is not None:
                step = momentum * old["momentum"] + (1.0 - momentum) * step
                new["momentum"] = step
            updates[path] = step.astype(param.dtype)
            moments[path] = new
        new_state = AdafactorState(state.count + 1, flax.traverse_util.unflatten_dict(moments))
        return flax.traverse_util.unflatten_dict(updates), new_state

    return optax.GradientTransformation(init, update)


def adafactor_names(
    names: dict[str, Any],
    shapes: dict[str, Any],
    *,
    min_dim_size_to_factor: int = 128,
    momentum: float | None = None,
) -> AdafactorState:
    """Dimension names of the state: those dimensions of a parameter that its moment keeps."""
    flat_shapes = flax.traverse_util.flatten_dict(shapes)
    moments = {}
    for path, param_names in flax.traverse_util.flatten_dict(names).items():
        factors = factor(param_names, flat_shapes[path].shape, min_dim_size_to_factor)
        moments[path] = {
            key: tuple(param_names[i] for i in dims)
            for key, dims in _moment_dims(factors, len(param_names), momentum).items()
        }
    return AdafactorState((), flax.traverse_util.unflatten_dict(moments))


def precondition(
    grad: jax.Array, moments: dict[str, jax.Array], factors: Factors, decay, epsilon1: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The gradient divided by the root of its running second moment, and the new moment."""
    square = jnp.square(grad) + epsilon1
    if not factors.factored:
        full = decay * moments["full"] + (1.0 - decay) * square
        return grad * jax.lax.rsqrt(full), {"full": full}
    row = decay * moments["row"] + (1.0 - decay) * jnp.mean(square, factors.columns)
    column = decay * moments["column"] + (1.0 - decay) * jnp.mean(square, factors.rows)
    # moment ~ row x column / mean(row): the rank-one matrix with these row and column means.
    row_wide = jnp.expand_dims(row, factors.columns)
    row_mean = jnp.mean(row_wide, factors.rows, keepdims=True)
    column_wide = jnp.expand_dims(column, factors.rows)
    step = grad * jax.lax.rsqrt(row_wide / row_mean) * jax.lax.rsqrt(column_wide)
    return step, {"row": row, "column": column}


def _moment_dims(factors: Factors, ndim: int, momentum: float | None) -> dict[str, tuple[int, ...]]:
    every = tuple(range(ndim))
    if factors.factored:
        dims = {
            "row": tuple(i for i in every if i not in factors.columns),
            "column": tuple(i for i in every if i not in factors.rows),
        }
    else:
        dims = {"full": every}
    return dims if momentum is None else {**dims, "momentum": every}


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), dims, keepdims=True))
