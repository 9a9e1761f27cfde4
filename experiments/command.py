"""One `glimmer` command as a process of its own, printed before it runs, tuned for a CPU."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def glimmer(mode: str, gin_file: str, *, devices: int | None = None, **macros: Any) -> None:
    """Runs `glimmer --run_mode=<mode>` with gin/examples/<gin_file>.gin and macros on top.

    `devices` is the number of virtual devices of a CPU; None is one a core, at most two.

    Ends this process with the command's exit code where that is not 0.
    """
    command = ["--run_mode=" + mode, f"--gin_file=gin/examples/{gin_file}.gin"]
    for name, value in macros.items():
        value = str(value) if isinstance(value, Path) else value
        command.append(f"--gin.{name}={value!r}")
    print(f"\n$ glimmer {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "glimmer_jax.main", *command],
        check=False,
        env=cpu_environment(devices),
    )
    if done.returncode:
        sys.exit(done.returncode)


def cpu_environment(devices: int | None = None) -> dict[str, str]:
    """This process's environment, with what makes a tiny model fast on a CPU; other devices ignore it.

    One virtual device a core, because small operations use one core each. And memory that the C
    library keeps between steps, in huge pages: fresh pages are a quarter of a tiny model's step.
    """
    devices = devices or (2 if (os.cpu_count() or 1) > 1 else 1)
    keep = "1000000000000"
    added = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold={keep}:"
        f"glibc.malloc.mmap_threshold={keep}",
    }
    joined = {"XLA_FLAGS": " ", "GLIBC_TUNABLES": ":"}
    return {
        **os.environ,
        # What was set before comes last, and wins.
        **{k: joined[k].join(filter(None, (v, os.environ.get(k)))) for k, v in added.items()},
    }
