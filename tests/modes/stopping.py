"""Commands that get SIGTERM while they work, alone or as a job of two processes."""

import os
import pathlib
import subprocess
import sys

from glimmer_jax import shipped
from tests.children import running

ALONE = ("glimmer_jax.main",)
TWO = ("launch", "local", "--num_processes=2", "--")


def stopped(program, line, mode, *files, **macros):
    """Exit code and output of a command, which gets SIGTERM as soon as it has said `line`.

    Args:
      program: ALONE or TWO.
      line: or a part of it.
      mode, files, macros: of the command line.
    """
    flags = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    flags += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    said = ""
    with running(
        [sys.executable, "-m", *program, *flags],
        cwd=pathlib.Path(shipped.root()),
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while line not in said and (text := process.stdout.readline()):
            said += text
        process.terminate()
        said += process.stdout.read()
        return process.wait(60), said
