"""Runs commands as one job: streams what they say, passes signals on, leaves nothing behind."""

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

from launch.plans import Argv, shell

# Seconds that the other processes of a job get after the first has failed. JAX misses a silent one
# after 100, and ends the others with a line that names it: they need longer than that.
GRACE = 180.0
POLL = 0.05  # seconds
# Set for a launcher that another one started: it stops when its input ends. See `obey_input`.
TIED = "GLIMMER_LAUNCH_TIED"


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a command ended, as shells report it, and what it printed, stripped."""

    code: int
    text: str
    errors: str


class Interrupts:
    """Context that counts Ctrl-C, SIGTERM and the terminal's end instead of dying of them."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()
        self.last = signal.SIGINT

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._on_signal) for number in heard()}
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
        # Shell and kernel both send it where a terminal is closed, and two interrupts would kill.
        if number == signal.SIGHUP and self.count:
            return
        self.count += 1
        self.last = signal.Signals(number)
        self._event.set()

    def sleep(self, seconds: float) -> None:
        """Sleeps, and wakes at an interrupt."""
        self._event.wait(seconds)

    @property
    def exit_code(self) -> int:
        """What shells report of a process that the last of them ended."""
        return 128 + self.last


def heard() -> tuple[signal.Signals, ...]:
    """What stops a launcher; the end of its terminal too, except under nohup."""
    hangup = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


def say(text: str) -> None:
    """Prints at once; without a terminal, machines must be deleted and children ended all the same."""
    try:
        print(text, flush=True)
    except OSError:
        # Nor may what is left in the buffer fail at the end, or a command that we start.
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
    """Runs commands side by side until all have ended.

    The first interrupt is passed on as SIGTERM, upon which glimmer saves; the second kills. If one
    command fails, the others get `grace` seconds and are killed.

    Args:
      argvs: the commands; each gets a process group of its own, of which nothing is left at the end.
      interrupts: in force.
      stdin: what every command reads.
      stderr: descriptor to which they complain; None: ours.
      grace: seconds.

    Returns:
      0, or the exit code of the first command that failed; 128 + N if signal N ended it.

    Raises:
      FileNotFoundError: a command does not exist.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for argv in argvs:
            # A file and no pipe: a command that reads nothing cannot hold us up.
            with tempfile.TemporaryFile() as given:
                given.write(stdin.encode())
                given.seek(0)
                processes.append(
                    subprocess.Popen(argv, stdin=given, stderr=stderr, start_new_session=True)
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
        say(f"launch: exit code {code}, once more: {shell(argv)}")
        interrupts.sleep(pause)
    return code


def run_heard(argv: Argv, interrupts: Interrupts) -> Answer:
    """As `run`; what the command says on stderr is shown at once, and is in the answer."""
    read_end, write_end = os.pipe()
    said = bytearray()

    def show() -> None:
        while chunk := os.read(read_end, 4096):
            said.extend(chunk)
            with contextlib.suppress(OSError):  # The terminal is closed.
                os.write(2, chunk)
        os.close(read_end)

    shower = threading.Thread(target=show, name="stderr", daemon=True)
    shower.start()
    try:
        code = run([argv], interrupts, stderr=write_end)
    finally:
        os.close(write_end)
    # Of its process group nothing is left to hold the pipe open; a daemon of its own could.
    shower.join(10.0)
    return Answer(code, "", said.decode(errors="replace").strip())


def read(argv: Argv, seconds: float = 120.0) -> Answer:
    """What a command answers; what it says on stderr is shown. After so long it is killed."""
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
            # With what it has started, which holds our pipes open.
            _send([process], signal.SIGKILL)
            text, errors = process.communicate()
            errors += f"{argv[0]} gave no answer within {seconds:g} s\n"
    with contextlib.suppress(OSError):  # The terminal is closed.
        sys.stderr.write(errors)
        sys.stderr.flush()
    return Answer(_failure([process]), text.strip(), errors.strip())


def obey_input() -> None:
    """Where TIED is set, the end of standard input is SIGTERM from now on."""
    if not os.environ.pop(TIED, None):
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="input", daemon=True).start()


def _wait(processes: Sequence[subprocess.Popen[Any]], interrupts: Interrupts, grace: float) -> int:
    heard, code, deadline = 0, 0, float("inf")
    while running := [process for process in processes if process.poll() is None]:
        if interrupts.count > heard:
            _send(running, signal.SIGKILL if heard else signal.SIGTERM)
            heard = interrupts.count
        code = code or _failure(processes)
        if code and deadline == float("inf"):
            deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            say(f"launch: a process ended with {code}, the others did not end")
            _send(running, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(POLL)
    return code or _failure(processes)


def _failure(processes: Sequence[subprocess.Popen[Any]]) -> int:
    """Exit code of the first that ended badly, as shells report it; 0 if there is none."""
    codes = [process.returncode for process in processes if process.returncode]
    return 0 if not codes else codes[0] if codes[0] > 0 else 128 - codes[0]


def _send(processes: Sequence[subprocess.Popen[Any]], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # The whole group has ended.
            os.killpg(process.pid, number)
