"""What JAX says when it ends a job of many processes, in our words and as an exit code.

When one process no longer answers, or does not come, JAX aborts all the others, from native code that
no Python code can catch. So the process that a launcher sees is a parent: it passes signals to the
child that does the work, reads what the child says, and explains its end. A parent and not a thread,
for what `filter_stderr` says of threads.
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

_ENDED = "JAX distributed service detected fatal errors"
_SILENT = re.compile(
    r"stopped sending heartbeats\):\n((?:[\d, ]+\n)+)|Task (\d+) heartbeat timeout"
)
_UNREACHED = re.compile(
    "Failed to send RPC to coordination service|DEADLINE_EXCEEDED|Socket closed|failed to connect"
)
_AGAIN = "Start the job again: it goes on from what it has saved."
_LINES = 1000  # of the child's last words that are looked at; an abort has some 30 of them
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def work_in_child(start_again: int) -> None:
    """Returns in a child of this process; the parent waits for it and ends as it does.

    To be called before JAX is imported, which does not survive a fork.

    Args:
      start_again: the parent's exit code where JAX ended the child because of another process.
    """
    reading, writing = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(writing)
        os._exit(_wait(child, reading, start_again))
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    # A signal to the whole group would come twice: directly, and from the parent.
    os.setpgid(0, 0)
    if sys.platform == "linux":
        # Who kills the parent means the work.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def explain(words: str) -> str | None:
    """Why JAX ended a process, of what it said last; None where no other process was missed."""
    # Who waits for the others at the end, in vain, has failed by itself, and has said so.
    if _ENDED not in words or "Barrier timed out" in words:
        return None
    if "CoordinationService/RegisterTask" in words:
        return (
            "Not all processes joined the job in time. Those that did end with this line; look at the "
            "one without: whether it was started, with a --process_id of its own, and reaches the "
            f"--coordinator_address. {_AGAIN}"
        )
    numbers = {
        int(n) for found in _SILENT.findall(words) for n in re.findall(r"\d+", "".join(found))
    }
    if numbers:
        silent = f"Process {', '.join(map(str, sorted(numbers)))} of the job no longer answers"
    elif _UNREACHED.search(words):
        # It is the one that counts the others.
        silent = "Process 0 of the job no longer answers"
    else:
        silent = "Another process of the job no longer answers"
    return (
        f"{silent}: it has died, or its machine stands still; its own output says more. All others have "
        f"ended. {_AGAIN}"
    )


def _wait(child: int, reading: int, start_again: int) -> int:
    """The parent: exit code of the child, as shells report it."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    last: collections.deque[bytes] = collections.deque(maxlen=_LINES)

    def forward() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                last.append(line)
                os.write(2, line)

    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # What the child left running may hold the pipe open for ever.
    reader.join(timeout=5)
    if code == -signal.SIGABRT and (why := explain(b"".join(last).decode(errors="replace"))):
        os.write(2, f"glimmer: {why}\n".encode())
        return start_again
    return code if code >= 0 else 128 - code
