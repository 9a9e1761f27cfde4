"""Target `local`: one job on this machine, in one process or in many that JAX joins.

A machine needs one process only, whatever its devices; many are the rehearsal of a pod on CPUs.
"""

import socket
from collections.abc import Sequence

from launch.plans import Together, check_at_least


def plan(flags: Sequence[str], num_processes: int, port: int, python: str) -> Together:
    """The processes of the job.

    Args:
      flags: of glimmer.
      num_processes: how many.
      port: free on this machine; process 0 listens there.
      python: the interpreter.

    Raises:
      ValueError: no processes.
    """
    check_at_least(1, num_processes=num_processes)
    command = (python, "-m", "glimmer_jax.main", *flags)
    if num_processes == 1:
        return Together((command,))
    address = f"127.0.0.1:{port}"
    # By default JAX listens on all addresses, IPv6 ones too: nobody else should reach this job, and
    # not every machine has IPv6.
    before = ("env", f"JAX_COORDINATOR_BIND_ADDRESS={address}")
    joined = (f"--coordinator_address={address}", f"--num_processes={num_processes}")
    return Together(
        tuple(
            (*before, *command, *joined, f"--process_id={process}")
            for process in range(num_processes)
        )
    )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
