"""Joins a job of many processes, described by flags or detected by JAX.

A launcher on one machine gives every process the address of process 0, the number of processes and its
own index. TPU pods, GKE and Slurm describe the job in the environment, where JAX reads it.
"""

import os
import sys
import threading
from typing import Any

import jax

from glimmer_jax.runtime.preemption import STOP

# Seconds that a finished process waits for the others: one builder may be days ahead of the slowest. A
# process that dies in the meantime is noticed after `silence`.
_SHUTDOWN_SECONDS = 7 * 24 * 3600


def join(
    detect: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    silence: int = 100,
) -> None:
    """Makes this process part of a job; does nothing by default. Call it before creating any array.

    Args:
      detect: let JAX detect the other three.
      coordinator_address: `host:port` of process 0, which listens there.
      num_processes: of the job.
      process_id: of this process, from 0.
      timeout: seconds to wait for all processes to join. JAX aborts after this and after `silence`;
        `supervisor` explains why.
      silence: seconds without a heartbeat of some process after which the job ends.

    Raises:
      ValueError: some of the three are missing, or out of range.
    """
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        if detect:
            _initialize(timeout, silence)
        return
    if detect or coordinator_address is None or num_processes is None or process_id is None:
        raise ValueError(
            "A job of many processes needs --coordinator_address, --num_processes and --process_id, "
            "all three, or --distributed alone where the environment describes it; got "
            f"{'--distributed, ' if detect else ''}coordinator_address={coordinator_address}, "
            f"num_processes={num_processes}, process_id={process_id}."
        )
    if ":" not in coordinator_address:
        raise ValueError(
            f"--coordinator_address must be HOST:PORT, got {coordinator_address!r}. Add a free port."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be from 0 to {num_processes - 1} (--num_processes={num_processes}), "
            f"got {process_id}."
        )
    _initialize(timeout, silence, coordinator_address, num_processes, process_id)


def _initialize(timeout: int, silence: int, *job: Any) -> None:
    jax.distributed.initialize(  # type: ignore[misc]
        *job,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=silence,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    STOP.reinstall()


def exit_after(code: int, seconds: float = 60.0) -> None:
    """Ends this process with `code` in `seconds`, even if the other processes never finish.

    A process that fails alone would otherwise wait for the others, and they for it. Does nothing
    outside a job.

    Args:
      code: exit code.
      seconds: for the others to fail as well, as they all do on the same invalid input.
    """
    if not jax.distributed.is_initialized():
        return

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
