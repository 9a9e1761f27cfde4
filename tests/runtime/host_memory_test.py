"""Memory that the C library keeps."""

import os
import platform
import subprocess
import sys

import pytest

from glimmer_jax.runtime import host_memory

# Page faults of a thread that fills an array of so many MB again and again.
FAULTS = """
import ctypes, resource, sys, threading
from glimmer_jax.runtime.host_memory import keep_freed_memory
kept = keep_freed_memory()
def fill():
    size = int(sys.argv[1]) << 20
    ctypes.memset((ctypes.c_char * size)(), 1, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        ctypes.memset((ctypes.c_char * size)(), 1, size)
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=fill)
thread.start()
thread.join()
"""


def faults(megabytes=64, **environment):
    plain = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    environment = {**plain, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", FAULTS, str(megabytes)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    kept, count = output.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_unless_the_user_decides():
    kept, few = faults()
    assert kept and few < 1000
    # Above the largest threshold that the C library accepts.
    kept, few = faults(megabytes=2100)
    assert kept and few < 1000
    kept, many = faults(MALLOC_ARENA_MAX="8")
    assert not kept and many > 4000
    kept, _ = faults(GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")
    assert not kept
    kept, _ = faults(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
    assert kept


def test_nothing_changes_where_an_accelerator_may_compute(monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(host_memory, "_ACCELERATORS", (str(tmp_path / "accel*"),))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not host_memory.keep_freed_memory()
