"""Runs commands as one job: shows their output, forwards signals, leaves no process behind."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from glimmer_jax.runtime.preemption import stop_signals
from launch.plans import Argv, shell

# Seconds until the other processes of a job are killed after the first has failed. JAX notices a
# silent process after 100 s, and ends the others with a line that names it.
GRACE = 180.0
POLL = 0.05  # seconds
# Set for a launcher that another launcher started: it stops at the end of its input (`obey_input`).
TIED = "GLIMMER_LAUNCH_TIED"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The exit code of a command, as shells report it, and its stripped stdout and stderr."""

    code: int
    text: str
    errors: str


class Interrupts:
    """Context that counts Ctrl-C, SIGTERM and SIGHUP instead of being ended by them."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()
        self.last = signal.SIGINT

    def __enter__(self) -> "Interrupts":
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in stop_signals()
        }
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Shell and kernel both send it when a terminal closes, and a second interrupt kills the
        # job.
        if number == signal.SIGHUP and self.count:
            return
        self.count += 1
        self.last = signal.Signals(number)
        self._event.set()

    def sleep(self, seconds: float) -> None:
        """Sleeps until an interrupt, at most `seconds`."""
        self._event.wait(seconds)

    @property
    def exit_code(self) -> int:
        """The code that shells report for a process ended by the last interrupt."""
        return 128 + self.last


def say(text: str) -> None:
    """Prints and flushes. A closed terminal must not stop the deletion of machines and processes."""
    try:
        print(text, flush=True)
    except OSError:
        # The rest of the buffer, flushed at exit, and the commands that we start must not fail
        # either.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def run(
    argvs: Sequence[Argv],
    interrupts: Interrupts,
    *,
    stdin: str = "",
    stderr: int | None = None,
    grace: float = GRACE,
) -> int:
    """Runs commands in parallel until all have ended.

    The first interrupt is forwarded as SIGTERM, on which glimmer saves; the second kills. If a
    command fails, the others are killed after `grace` seconds.

    Args:
      argvs: the commands; each runs in its own process group, which is killed at the end.
      interrupts: an entered context.
      stdin: standard input of every command.
      stderr: descriptor for their stderr; None: ours.
      grace: seconds.

    Returns:
      0, or the exit code of the first command that failed; 128 + N if signal N ended it.

    Raises:
      FileNotFoundError: a command does not exist.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for argv in argvs:
            # A file instead of a pipe: a command that reads nothing cannot block us.
            with tempfile.TemporaryFile() as file:
                file.write(stdin.encode())
                file.seek(0)
                processes.append(
                    subprocess.Popen(argv, stdin=file, stderr=stderr, start_new_session=True)
                )
        return _wait(processes, interrupts, grace)
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def run_again(argv: Argv, interrupts: Interrupts, *, attempts: int, pause: float) -> int:
    """Runs one command until it succeeds, or `attempts` times; `pause` seconds in between."""
    for attempt in range(attempts):
        code = run([argv], interrupts)
        if code == 0 or interrupts.count or attempt + 1 == attempts:
            break
        say(f"launch: exit code {code}, retrying: {shell(argv)}")
        interrupts.sleep(pause)
    return code


def run_showing_errors(argv: Argv, interrupts: Interrupts) -> Answer:
    """As `run` for one command; its stderr is shown at once, and is part of the answer."""
    read_end, write_end = os.pipe()
    output = bytearray()

    def show() -> None:
        while chunk := os.read(read_end, 4096):
            output.extend(chunk)
            with contextlib.suppress(OSError):  # The terminal is closed.
                os.write(2, chunk)
        os.close(read_end)

    shower = threading.Thread(target=show, name="stderr", daemon=True)
    shower.start()
    try:
        code = run([argv], interrupts, stderr=write_end)
    finally:
        os.close(write_end)
    # Its process group is gone; only a daemon could still hold the pipe open.
    shower.join(10.0)
    return Answer(code, "", output.decode(errors="replace").strip())


def read(argv: Argv, seconds: float = 120.0) -> Answer:
    """The answer of a command, whose stderr is shown; it is killed after `seconds`."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # With its children, which hold our pipes open.
            _send([process], signal.SIGKILL)
            text, errors = process.communicate()
            errors += f"{argv[0]} gave no answer within {seconds:g} s\n"
    with contextlib.suppress(OSError):  # The terminal is closed.
        sys.stderr.write(errors)
        sys.stderr.flush()
    return Answer(_failure([process]), text.strip(), errors.strip())


def obey_input() -> None:
    """If TIED is set, the end of standard input acts as SIGTERM from now on."""
    if not os.environ.pop(TIED, None):
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="input", daemon=True).start()


def _wait(processes: Sequence[subprocess.Popen[Any]], interrupts: Interrupts, grace: float) -> int:
    handled, code, deadline = 0, 0, float("inf")
    while running := [process for process in processes if process.poll() is None]:
        if interrupts.count > handled:
            _send(running, signal.SIGKILL if handled else signal.SIGTERM)
            handled = interrupts.count
        code = code or _failure(processes)
        if code and deadline == float("inf"):
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            say(f"launch: a process ended with {code}; killing the others, which did not end")
            _send(running, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL)
    return code or _failure(processes)


def _failure(processes: Sequence[subprocess.Popen[Any]]) -> int:
    """Exit code of the first process that failed, as shells report it; 0 if none did."""
    codes = [process.returncode for process in processes if process.returncode]
    return 0 if not codes else codes[0] if codes[0] > 0 else 128 - codes[0]


def _send(processes: Sequence[subprocess.Popen[Any]], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # The process group has ended.
            os.killpg(process.pid, number)
