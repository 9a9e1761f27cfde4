"""Being asked to stop: SIGTERM is noticed here and acted on where a job can save.

A preempted machine sends SIGTERM and allows some seconds. A handler must not save by itself (it may
interrupt anything), so it only raises a flag, and every loop that has something to save polls the flag
between two units of work, saves, and raises `Preempted`, which the command line turns into exit code
42 ("start me again"). Everything else is simply left, by `leave_at_sigterm`: what it writes appears
whole or not at all.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType


class Preempted(Exception):
    """The job was asked to stop, has saved what it did, and goes on when started again."""


class Interrupted(Exception):
    """Work that its caller finishes by saving was cut short; nothing is saved yet."""


@contextlib.contextmanager
def leave_at_sigterm() -> Iterator[None]:
    """Raises `Preempted` where the main thread stands when SIGTERM comes; a Watcher inside takes over.

    Outside the main thread, where Python installs no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Preempted("Stopped by SIGTERM.")

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Watcher:
    """Context that turns SIGTERM into a flag; restores the previous handler on leaving.

    Outside the main thread, where Python installs no handlers, the flag can still be raised by
    `request()`.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._installed = False

    def __enter__(self) -> "Watcher":
        if threading.current_thread() is threading.main_thread():
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
            self._installed = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._event.set()

    def request(self) -> None:
        """Asks the loop that polls this watcher to save and stop."""
        self._event.set()

    @property
    def requested(self) -> bool:
        """True once SIGTERM has arrived."""
        return self._event.is_set()

    def poll(self) -> None:
        """Raises Interrupted once SIGTERM has arrived; for work that may be given up half done."""
        if self.requested:
            raise Interrupted("SIGTERM")
