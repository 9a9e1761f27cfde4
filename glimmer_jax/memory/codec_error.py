"""Error of stored memory: the stored arrays against the states of the same passages in float32."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory import encoding
from glimmer_jax.memory.encoding import Encode, States, StatesFunction
from glimmer_jax.models.model import GlimmerModel


def exact_states(model: GlimmerModel) -> StatesFunction:
    """The model's `memory_states` with activations, operands and products in float32."""
    exact = GlimmerModel(
        model.config.with_t5(dtype="float32", matmul_dtype=None, attention="plain")
    )

    def states(params, tokens):
        # By default a TPU rounds the operands of float32 products to bfloat16.
        with jax.default_matmul_precision("highest"):
            return exact.memory_states(params, tokens)

    return states


def measure(
    encode: Encode,
    reference: States,
    passages: Any,
    decode: Callable[[codecs.Arrays], Any],
    *,
    rows: int,
    buckets: Sequence[int],
    devices: int,
    sample: int,
) -> dict[str, float] | None:
    """Error of the stored arrays over the real tokens of evenly spaced passages.

    Args:
      encode: the encode step, as the build calls it.
      reference: int32 tokens `[n, P]` -> float32 states `[n, P, D]`.
      passages: with `lengths` and `tokens`, as `Passages`.
      decode: the codec's arrays -> float32 states.
      rows: passages in the batch of one device.
      buckets: lengths that passages are padded to.
      devices: that the step divides its rows over.
      sample: passages to measure on.

    Returns:
      relative_rms (of the difference, over that of the reference), relative_max (largest
      difference over largest reference value), and the number of passages; None without passages.
    """
    count = min(sample, len(passages))
    if not count:
        return None
    chosen = np.unique(np.linspace(0, len(passages) - 1, count).astype(np.int64))
    lengths = np.minimum(passages.lengths(chosen), buckets[-1])
    square_error = square = largest_error = largest = 0.0
    for group in encoding.groups(lengths, rows, buckets):
        own = passages.tokens(chosen[group.positions], group.bucket)
        tokens = encoding.padded(own, rows * devices)
        stored = np.asarray(decode(encode(tokens)[0]), np.float64)
        exact = np.asarray(reference(tokens), np.float64)
        real = np.arange(group.bucket) < lengths[group.positions][:, None]
        exact, stored = (x[: len(group.positions)][real] for x in (exact, stored))
        square_error += float(np.square(stored - exact).sum())
        square += float(np.square(exact).sum())
        largest_error = max(largest_error, float(np.abs(stored - exact).max(initial=0.0)))
        largest = max(largest, float(np.abs(exact).max(initial=0.0)))
    return {
        # Six digits: readable, and the same on every run.
        "relative_rms": float(f"{(square_error / max(square, 1e-300)) ** 0.5:.6g}"),
        "relative_max": float(f"{largest_error / max(largest, 1e-300):.6g}"),
        "passages": len(chosen),
    }
