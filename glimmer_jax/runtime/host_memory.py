"""Memory of the C library on a machine that computes on its CPU.

XLA's CPU programs allocate their temporary arrays again at each call. The GNU C library returns large
ones to the kernel when they are freed, and the next call pays for every page again: a batch of eight
questions to the tiny GLIMMER takes 53 ms instead of 36, a training step of T5 Base used as FiD 8.1 s of
CPU time instead of 5.9.
"""

import ctypes
import glob
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_NEVER = -1  # of trimming
# What NVIDIA, AMD and TPU drivers create.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for its next allocation; returns whether it does.

    Call it before JAX starts its threads: all threads then share one arena, since the others return
    their memory. The resident size stays at its peak.

    Nothing changes where an accelerator may compute, where the C library is another one, or where the
    environment sets one of the parameters of malloc that decide this (mallopt(3)).
    """
    if _accelerated() or _set_by_user():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Without mappings of their own, allocations of any size come from the heap, which keeps them.
    # (The threshold of such mappings cannot be above 2 GB, and a training step's arrays are.)
    kept = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_ARENA_MAX, 1)]
    return all(kept)


def _accelerated() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    names = ("arena_max", "mmap_max", "mmap_threshold", "trim_threshold")
    variables = ("ARENA_MAX", "MMAP_MAX_", "MMAP_THRESHOLD_", "TRIM_THRESHOLD_")
    return any(f"malloc.{name}=" in tunables for name in names) or any(
        f"MALLOC_{name}" in os.environ for name in variables
    )
