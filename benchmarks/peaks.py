"""Measured peak rates of a device: matrix products and memory reads, per framework.

Each rate is the best of several trials, since other processes only slow it down.
"""

import time
from collections.abc import Callable
from typing import Any

TRIALS = 5
SIDE = {True: 2048, False: 8192}  # of the square matrices, on a CPU and elsewhere
BYTES = 256 << 20  # read, more than any cache


def best_seconds(run: Callable[[], Any]) -> float:
    """The fastest of several runs, after a warm-up."""
    run()
    times = []
    for _ in range(TRIALS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def jax_peaks(dtype: str) -> dict[str, float]:
    """FLOPs and bytes per second; operands in `dtype`, results in float32 (on a GPU in `dtype`)."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    side, count = SIDE[on_cpu], BYTES // 4
    result = jnp.float32 if on_cpu else jnp.dtype(dtype)
    x = jnp.ones((side, side), dtype)
    numbers = jnp.ones(count, jnp.float32)
    multiply = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=result))
    read = jax.jit(jnp.sum)
    return _rates(
        side,
        best_seconds(lambda: multiply(x).block_until_ready()),
        numbers.nbytes,
        best_seconds(lambda: read(numbers).block_until_ready()),
    )


def torch_peaks(dtype: str, device: str) -> dict[str, float]:
    """`jax_peaks` for PyTorch, with results in `dtype`."""
    import torch

    on_cpu = device == "cpu"
    side, count = SIDE[on_cpu], BYTES // 4
    x = torch.ones((side, side), dtype=getattr(torch, dtype), device=device)
    numbers = torch.ones(count, device=device)
    wait = (lambda: None) if on_cpu else torch.cuda.synchronize

    def multiply():
        torch.mm(x, x)
        wait()

    def read():
        numbers.sum()
        wait()

    return _rates(side, best_seconds(multiply), 4 * count, best_seconds(read))


def _rates(side: int, multiplied: float, read_bytes: int, read: float) -> dict[str, float]:
    return {
        "peak_flops_per_second": 2 * side**3 / multiplied,
        "peak_bytes_per_second": read_bytes / read,
    }


def bound_seconds(flops: int, decoder_bytes: int, answer: int, peaks: dict[str, float]) -> float:
    """Lower bound: all products at peak rate, plus one read of the decoder's weights per token."""
    return (
        flops / peaks["peak_flops_per_second"]
        + answer * decoder_bytes / peaks["peak_bytes_per_second"]
    )
