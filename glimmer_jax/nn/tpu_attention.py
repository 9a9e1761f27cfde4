"""Self-attention with a Pallas kernel for TPUs and T5's position bias: logits stay out of HBM.

Sequences of the encoder are short (a question and a passage), so that all logits of a head fit in a
core's VMEM: up to 512 tokens, or 1,024 except on v4, with two heads of 64 channels. One step of the
kernel handles one sequence and as many heads as fill the 128 lanes. The backward kernel recomputes
the weights. Other TPU kernels do not fit: JAX's `flash_attention` takes a bias per sequence,
`[B, H, N, N]`, and splash attention and tokamax 0.0.12 take none. Not yet run on a TPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glimmer_jax import axes, partitioning

MASKED = -1e30
LANES = 128
# Bytes of VMEM that long sequences need. A kernel gets 16 MiB unless it asks for more, which v4 lacks.
LONG_VMEM = 64 * 2**20
# Contracted dimensions of a product: `x @ y.T` and `x.T @ y`.
_ROWS = (((1,), (1,)), ((), ()))
_COLUMNS = (((0,), (0,)), ((), ()))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    bias: jax.Array,
    keep: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`nn.attention.attend` of a sequence to itself.

    Args:
      query: `[..., N, H, C]`, any float dtype.
      key: `[..., N, H, C]`.
      value: `[..., N, H, C]`.
      key_mask: bool `[..., N]`; False keys are ignored.
      bias: float32 `[H, N, N]`, added to the logits.
      keep: dropout factors of the weights, `[..., H, N]`, the same for all queries.
      interpret: emulate the kernel on any device.

    Returns:
      `[..., N, H, C]` in the dtype of `value`; zeros for a sequence without keys.

    Raises:
      ValueError: the program is not for TPUs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    if platform != "tpu" and not interpret:
        raise ValueError(
            f"attention='tpu' (ATTENTION) needs a TPU, and this program is for {platform}. Set "
            "ATTENTION='plain'."
        )
    *lead, length, heads, channels = query.shape
    if keep is None:
        keep = jnp.ones((*lead, heads, length), jnp.float32)

    def local(query, key, value, key_mask, bias, keep):
        """One device's sequences and heads."""
        joined = (-1, length, query.shape[-2] * channels)
        out = _attention(
            *(x.reshape(joined) for x in (query, key, value)),
            key_mask.reshape(-1, 1, length).astype(jnp.float32),
            bias,
            keep.reshape(-1, *keep.shape[-2:]),
            interpret,
        )
        return out.reshape(value.shape)

    if mesh.empty or mesh.are_all_axes_manual:
        return local(query, key, value, key_mask, bias, keep)
    # Only the single row that initialises the parameters does not divide evenly.
    rows = [
        name if size % partitioning.parts(mesh.shape, name) == 0 else None
        for name, size in zip((axes.BATCH, axes.PASSAGES), lead, strict=False)
    ]
    states = partitioning.spec((*rows, None, axes.ACT_HEADS, None))
    by_head = partitioning.spec((axes.ACT_HEADS, None, None))
    return jax.shard_map(
        local,
        in_specs=(
            *(states,) * 3,
            partitioning.spec((*rows, None)),
            by_head,
            partitioning.spec((*rows, axes.ACT_HEADS, None)),
        ),
        out_specs=states,
        # Pallas calls do not declare over which axes their outputs vary.
        check_vma=False,
    )(query, key, value, key_mask, bias, keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, mask, bias, keep, interpret):
    """Queries, keys and values `[R, N, H*C]`, mask `[R, 1, N]`, bias `[H, N, N]`, keep `[R, H, N]`."""
    outputs = [jax.ShapeDtypeStruct(value.shape, value.dtype)]
    return _call(_forward, (query, key, value, mask, bias, keep), outputs, interpret)[0]


def _attention_forward(query, key, value, mask, bias, keep, interpret):
    inputs = (query, key, value, mask, bias, keep)
    return _attention(*inputs, interpret), inputs


def _attention_backward(interpret, inputs, gradient):
    query, key, value, _, bias, _ = inputs
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value, bias)]
    *gradients, to_bias = _call(_backward, (*inputs, gradient), outputs, interpret)
    return *gradients, None, to_bias, None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(
    kernel: Callable[..., None],
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Any:
    """Runs `kernel` for each sequence and group of heads."""
    query, _, _, _, bias, keep, *rest = inputs
    (rows, length, joined), heads = query.shape, bias.shape[0]
    channels = joined // heads
    group = max(LANES // channels, 1)
    if heads % group or group * channels % LANES:
        group = heads  # a block may always cover a complete dimension
    states = pl.BlockSpec((1, length, group * channels), lambda head, row: (row, 0, head))
    biases = pl.BlockSpec((group, length, length), lambda head, row: (head, 0, 0))
    masks = pl.BlockSpec((1, 1, length), lambda head, row: (row, 0, 0))
    keeps = pl.BlockSpec((1, 1, group, length), lambda head, row: (row, head, 0, 0))
    is_long = group * length**2 > 2 * 512**2
    return pl.pallas_call(
        functools.partial(kernel, channels=channels),
        grid=(heads // group, rows),
        in_specs=[*[states] * 3, masks, biases, keeps, *[states] * len(rest)],
        out_specs=[states, states, states, biases][: len(outputs)],
        out_shape=list(outputs),
        # The gradient of the bias is summed over the rows.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=LONG_VMEM if is_long else None,
        ),
        interpret=interpret,
    )(*inputs[:5], keep.reshape(rows, heads // group, group, length), *rest)


def _weights(query, key, mask, bias):
    """Unnormalised weights `[N, N]` and the factors `[N, 1]` that normalise them, float32."""
    logits = jax.lax.dot_general(query, key, _ROWS, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits + bias, MASKED)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, 1.0 / jnp.where(total > 0, total, 1.0)


def _forward(query, key, value, mask, bias, keep, out, *, channels):
    seen = mask[0] > 0
    for head in range(bias.shape[0]):
        at = (0, slice(None), slice(head * channels, (head + 1) * channels))
        weights, scale = _weights(query[at], key[at], seen, bias[head])
        weights = (weights * keep[0, 0, head : head + 1]).astype(value.dtype)
        product = jnp.dot(weights, value[at], preferred_element_type=jnp.float32)
        out[at] = (product * scale).astype(out.dtype)


def _backward(
    query, key, value, mask, bias, keep, gradient, to_query, to_key, to_value, to_bias, *, channels
):
    seen = mask[0] > 0

    @pl.when(pl.program_id(1) == 0)
    def _():
        to_bias[...] = jnp.zeros_like(to_bias)

    def product(x, y, contracted):
        return jax.lax.dot_general(x, y, contracted, preferred_element_type=jnp.float32)

    for head in range(bias.shape[0]):
        at = (0, slice(None), slice(head * channels, (head + 1) * channels))
        kept = keep[0, 0, head : head + 1]
        weights, scale = _weights(query[at], key[at], seen, bias[head])
        weights = weights * scale
        to_weights = product(gradient[at], value[at], _ROWS) * kept
        mean = jnp.sum(weights * to_weights, axis=-1, keepdims=True)
        to_logits = weights * (to_weights - mean)
        to_bias[head] += to_logits
        to_logits = to_logits.astype(query.dtype)
        to_query[at] = jnp.dot(to_logits, key[at], preferred_element_type=jnp.float32).astype(
            to_query.dtype
        )
        to_key[at] = product(to_logits, query[at], _COLUMNS).astype(to_key.dtype)
        dropped = (weights * kept).astype(gradient.dtype)
        to_value[at] = product(dropped, gradient[at], _COLUMNS).astype(to_value.dtype)
