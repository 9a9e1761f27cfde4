"""Target `local`: a job on this machine, in one process or in several that JAX joins.

One process uses all devices of a machine; several processes rehearse a pod on CPUs.
"""

import socket
from collections.abc import Sequence

from launch.plans import LocalPlan, check_at_least


def plan(flags: Sequence[str], num_processes: int, port: int, python: str) -> LocalPlan:
    """The processes of the job.

    Args:
      flags: of glimmer.
      num_processes: number of processes.
      port: free on this machine; process 0 listens there.
      python: the interpreter.

    Raises:
      ValueError: `num_processes` is below 1.
    """
    check_at_least(1, num_processes=num_processes)
    command = (python, "-m", "glimmer_jax.main", *flags)
    if num_processes == 1:
        return LocalPlan((command,))
    address = f"127.0.0.1:{port}"
    # By default JAX listens on all addresses, including IPv6. This job is private, and not every machine
    # has IPv6.
    before = ("env", f"JAX_COORDINATOR_BIND_ADDRESS={address}")
    joined = (f"--coordinator_address={address}", f"--num_processes={num_processes}")
    return LocalPlan(
        tuple(
            (*before, *command, *joined, f"--process_id={process}")
            for process in range(num_processes)
        )
    )


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
