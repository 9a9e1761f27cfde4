"""What the device reaches at its best, measured: the rate of matrix products, and of reading memory.

Each framework is held against its own: both are the best of several tries, since whoever else is at
work only makes them slower.
"""

import time
from collections.abc import Callable
from typing import Any

TRIES = 5
SIDE = {True: 2048, False: 8192}  # of the square matrices, on a CPU and elsewhere
BYTES = 256 << 20  # read, more than any cache holds


def best_seconds(run: Callable[[], Any]) -> float:
    """Of `run`, after one that does not count."""
    run()
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def jax_peaks(dtype: str) -> dict[str, float]:
    """FLOPs a second with operands in `dtype` and float32 results (a GPU: in `dtype`), bytes a second."""
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
    """The same of PyTorch, results in `dtype`."""
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


def floor_seconds(flops: int, decoder_bytes: int, answer: int, peaks: dict[str, float]) -> float:
    """All products at the peak rate, and the decoder's weights read once for each answer token."""
    return (
        flops / peaks["peak_flops_per_second"]
        + answer * decoder_bytes / peaks["peak_bytes_per_second"]
    )
