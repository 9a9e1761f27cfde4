"""A parent process that explains why JAX ended its child, and turns that into an exit code.

When one process of a job stops answering, or never joins, JAX aborts all the others from native
code, which Python cannot catch. So the process that a launcher sees is a parent: it forwards
signals to the child that does the work, reads the child's stderr, and explains its end. It is a
process and not a thread, because a thread dies with the process that aborts.
"""

import collections
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from types import FrameType

from glimmer_jax.runtime.preemption import stop_signals

_FATAL = "JAX distributed service detected fatal errors"
_SILENT = re.compile(
    r"stopped sending heartbeats\):\n((?:[\d, ]+\n)+)|Task (\d+) heartbeat timeout"
)
_UNREACHABLE = re.compile(
    "Failed to send RPC to coordination service|DEADLINE_EXCEEDED|Socket closed|failed to connect"
)
_RETRY = "Run the same command again: it resumes from the last save."
_LINES = 1000  # of the child's last output that are searched; an abort prints about 30
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def work_in_child(retry_code: int) -> None:
    """Returns in a child of this process; the parent waits for it and exits with its code.

    Call it before JAX is imported, since JAX does not survive a fork.

    Args:
      retry_code: the parent's exit code where JAX ended the child because of another process.
    """
    read_end, write_end = os.pipe()
    # Signals that arrive before the parent forwards them wait.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(write_end)
        os._exit(_wait(child, read_end, retry_code))
    os.close(read_end)
    os.dup2(write_end, 2)
    os.close(write_end)
    # A signal to the process group would arrive twice: directly, and from the parent.
    os.setpgid(0, 0)
    if sys.platform == "linux":
        # Killing the parent must end the work too.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def describe_abort(output: str) -> str | None:
    """Why JAX ended a process, from its last output; None if it was not for another process."""
    # A process that waits for the others in vain at its end has failed by itself, and said why.
    if _FATAL not in output or "Barrier timed out" in output:
        return None
    if "CoordinationService/RegisterTask" in output:
        return (
            "Not all processes joined the job in time. Look for the process whose output lacks this "
            "line: check that it was started, with its own --process_id, and that it reaches the "
            f"--coordinator_address. {_RETRY}"
        )
    numbers = {
        int(n) for match in _SILENT.findall(output) for n in re.findall(r"\d+", "".join(match))
    }
    if numbers:
        silent = f"Process {', '.join(map(str, sorted(numbers)))} of the job no longer answers"
    elif _UNREACHABLE.search(output):
        silent = "Process 0 of the job no longer answers"  # It hosts the coordination service.
    else:
        silent = "Another process of the job no longer answers"
    return (
        f"{silent}: it died or its machine hangs; see its own output. All other processes have ended. "
        f"{_RETRY}"
    )


def _wait(child: int, read_end: int, retry_code: int) -> int:
    """The parent: the child's exit code, as shells report it."""

    def forward_signal(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    signals = stop_signals()
    for number in signals:
        signal.signal(number, forward_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    last_lines: collections.deque[bytes] = collections.deque(maxlen=_LINES)

    def forward_output() -> None:
        with os.fdopen(read_end, "rb") as lines:
            for line in lines:
                last_lines.append(line)
                os.write(2, line)

    reader = threading.Thread(target=forward_output, daemon=True)
    reader.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # A process that the child left behind may hold the pipe open.
    reader.join(timeout=5)
    output = b"".join(last_lines).decode(errors="replace")
    if code == -signal.SIGABRT and (reason := describe_abort(output)):
        os.write(2, f"glimmer: {reason}\n".encode())
        return retry_code
    return code if code >= 0 else 128 - code
