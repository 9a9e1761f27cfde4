"""Memory of the C library on a machine that computes on its CPU.

XLA's CPU programs allocate their temporary arrays anew at each call. The GNU C library returns large
ones to the kernel when they are freed, and the next call pays for every page again: a batch of eight
questions to the tiny GLIMMER takes 53 ms instead of 36.
"""

import ctypes
import glob
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGEST = 2**31 - 1
# What NVIDIA, AMD and TPU drivers create.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for its next allocation; returns whether it does.

    Call it before JAX starts its threads: all threads then share one arena, since the others return
    their memory. The resident size stays at its peak.

    Nothing changes where an accelerator may compute, where the C library is another one, or where the
    environment sets one of the three parameters of malloc (mallopt(3)).
    """
    if _accelerated() or _set_by_user():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Older versions limit this threshold to 32 MB. Setting the others alone would do harm.
    if not mallopt(_M_MMAP_THRESHOLD, _LARGEST):
        return False
    kept = [mallopt(_M_TRIM_THRESHOLD, _LARGEST), mallopt(_M_ARENA_MAX, 1)]
    return all(kept)


def _accelerated() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    names = ("arena_max", "mmap_threshold", "trim_threshold")
    variables = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    return any(f"malloc.{name}=" in tunables for name in names) or any(
        name in os.environ for name in variables
    )
