"""Being asked to stop: SIGTERM is noticed here and acted on where a job can save.

A preempted machine sends SIGTERM and allows some seconds. A handler must not save by itself (it may
interrupt anything), so it only raises a flag, and every loop that has something to save polls the flag
between two units of work, saves, and raises `Preempted`, which the command line turns into exit code
42 ("start me again"). Everything else is simply left, by `leave_at_sigterm`: what it writes appears
whole or not at all. In a job of many processes `stop_together` leaves it, between two units of work.
"""

import contextlib
import ctypes
import itertools
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")
_calls = itertools.count()  # of all loops together


class Preempted(Exception):
    """The job was asked to stop, has saved what it did, and goes on when started again."""


class Interrupted(Exception):
    """Work that its caller finishes by saving was cut short; nothing is saved yet."""


@contextlib.contextmanager
def leave_at_sigterm() -> Iterator[None]:
    """Raises `Preempted` where the main thread stands when SIGTERM comes; a Watcher inside takes over.

    It does nothing outside the main thread, where Python installs no handlers, and in a job of many
    processes, where JAX listens to SIGTERM and a handler of ours would keep it from JAX.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or jax.distributed.is_initialized():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Preempted("Stopped by SIGTERM.")

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop_together() -> None:
    """Raises `Preempted` in all processes of a job at one call, soon after SIGTERM came to one.

    All processes make the same calls, of this and of a Watcher's `requested_at` and `poll`. For loops
    that save nothing; a process alone is stopped by `leave_at_sigterm`.
    """
    if jax.process_count() > 1 and _at_sync_point():
        raise Preempted("Stopped by SIGTERM between two batches. Run the same command again.")


def _at_sync_point() -> bool:
    # JAX finds a number that no process has come to, and says yes to this one alone.
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def stoppable(items: Iterable[T], every: int = 1024) -> Iterator[T]:
    """The items, the same in all processes; before each `every` of them, `stop_together`."""
    for number, item in enumerate(items):
        if number % every == 0:
            stop_together()
        yield item


class Watcher:
    """Context that turns SIGTERM into a flag; restores the previous handler on leaving.

    Outside the main thread, where Python installs no handlers, the flag can still be raised by
    `request()`.

    Args:
      together: the processes of a job stop at one and the same place, asked with `requested_at` or
        `poll`; if each stopped where its own signal came, the others would wait for it for ever.
    """

    def __init__(self, together: bool = False) -> None:
        self._event = threading.Event()
        self._installed = False
        self._together = together and jax.process_count() > 1
        self._reached = False

    def __enter__(self) -> "Watcher":
        # Between processes JAX carries the news; it listens to SIGTERM since the job was joined.
        if not self._together and threading.current_thread() is threading.main_thread():
            self._native = _Handler()
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            # Python knows nothing of JAX's handler and has put the system's own in its place.
            self._native.restore()
            self._installed = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._event.set()

    def request(self) -> None:
        """Asks the loop that polls this watcher to save and stop."""
        if self._together:
            signal.raise_signal(signal.SIGTERM)
        self._event.set()

    @property
    def requested(self) -> bool:
        """True once SIGTERM has arrived at this process."""
        return self._event.is_set()

    def requested_at(self) -> bool:
        """True in all processes at the same call, soon after SIGTERM has arrived at any of them.

        It stays true from there on.
        """
        if self._together:
            self._reached = self._reached or _at_sync_point()
            return self._reached
        return self.requested

    def poll(self) -> None:
        """Raises Interrupted once SIGTERM has arrived; for work that may be given up half done.

        Between processes it is raised in all of them at the same call.
        """
        if self.requested_at():
            raise Interrupted("SIGTERM")


class _Handler:
    """What SIGTERM does now, for whomever it was set, Python or not."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        # The C library's `struct sigaction`, of which we need to know no more than its size, at most.
        self._action = ctypes.create_string_buffer(1024)
        self._libc.sigaction(int(signal.SIGTERM), None, self._action)

    def restore(self) -> None:
        self._libc.sigaction(int(signal.SIGTERM), self._action, None)
