"""Joining a job of many processes: told by flags, or found by JAX where it runs.

A launcher on one machine gives every process the address of the first, their number and its own
place. TPU pods, GKE and Slurm describe all that in the environment, and JAX reads it there.
"""

import os
import sys
import threading

import jax

# Seconds that a process which is done waits for the others: a builder may be days ahead of the slowest.
# One that dies meanwhile is missed after `silence`.
_FAREWELL = 7 * 24 * 3600


def join(
    detect: bool = False,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    silence: int = 100,
) -> None:
    """Makes this process one of a job's; does nothing where nothing is asked. Before any array.

    Args:
      detect: let JAX find the other three in the environment.
      coordinator_address: `host:port` of process 0, which listens there.
      num_processes: of the job.
      process_id: of this process, from 0.
      timeout: seconds to wait for all the others. Both ends are JAX's: it aborts, and `last_words`
        says why.
      silence: seconds after which a process that sends no sign of life ends the job.

    Raises:
      ValueError: some of the three without the others, or numbers that do not fit.
    """
    told = (coordinator_address, num_processes, process_id)
    if all(value is None for value in told):
        if detect:
            jax.distributed.initialize(
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=silence,
                shutdown_timeout_seconds=_FAREWELL,
            )
        return
    if detect or coordinator_address is None or num_processes is None or process_id is None:
        raise ValueError(
            "A job of many processes needs --coordinator_address, --num_processes and --process_id, "
            "all three, or --distributed alone where the environment tells them; got "
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
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=silence,
        shutdown_timeout_seconds=_FAREWELL,
    )


def leave_soon(code: int, seconds: float = 60.0) -> None:
    """Ends this process with `code` even where the others do not come to the end with it.

    A process that fails by itself would wait for the others, and they for it. Where no job was joined it
    does nothing.

    Args:
      code: of exit.
      seconds: for the others to fail with it, as all do over the same bad input.
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
