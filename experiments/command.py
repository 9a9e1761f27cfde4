"""Runs a `glimmer` command in its own process, with settings that are fast on a CPU."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from glimmer_jax.runtime import compilation_cache


def glimmer(mode: str, *gin_files: str, devices: int | None = None, **macros: Any) -> None:
    """Prints and runs `glimmer --run_mode=<mode>` with gin files and macros.

    Args:
      mode: run mode.
      gin_files: names below gin/, without suffix.
      devices: number of virtual CPU devices; None is one per core, at most two.
      macros: override those of the gin files.

    Raises:
      SystemExit: the command failed; with its exit code.
    """
    command = ["--run_mode=" + mode, *(f"--gin_file=gin/{file}.gin" for file in gin_files)]
    for name, value in macros.items():
        value = str(value) if isinstance(value, Path) else value
        command.append(f"--gin.{name}={value!r}")
    print(f"\n$ glimmer {shlex.join(command)}", flush=True)
    run_module("glimmer_jax.main", *command, devices=devices)


def run_module(module: str, *args: str, devices: int | None = None) -> None:
    """Runs a Python module in its own process with the environment of `cpu_environment`.

    Raises:
      SystemExit: the process failed; with its exit code.
    """
    result = subprocess.run(
        [sys.executable, "-m", module, *args], check=False, env=cpu_environment(devices)
    )
    if result.returncode:
        sys.exit(result.returncode)


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_environment(devices: int | None = None) -> dict[str, str]:
    """This process's environment with settings that make a tiny model fast on a CPU.

    It uses one virtual device per core, because small operations use one core each. The C library
    uses huge pages, because page faults take a quarter of a tiny model's step; that it keeps freed
    memory, `glimmer` sees to. Other devices ignore these settings. Compiled programs are cached where
    `glimmer` caches them.
    """
    devices = devices or min(2, cores())
    added = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    joined = {"XLA_FLAGS": " ", "GLIBC_TUNABLES": ":"}
    return {
        compilation_cache.VARIABLE: compilation_cache.FOLDER,
        **os.environ,
        # The user's own settings come last, so that they take precedence.
        **{k: joined[k].join(filter(None, (v, os.environ.get(k)))) for k, v in added.items()},
    }
