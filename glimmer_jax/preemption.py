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

import jax
from jax.experimental import multihost_utils


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


def stop_together(count: int) -> None:
    """Raises `Preempted` in all processes of a job at one `count`, soon after SIGTERM came to one.

    For loops that save nothing; a process alone is stopped by `leave_at_sigterm`.

    Args:
      count: grows from call to call, and is the same in all processes.
    """
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(count):
        raise Preempted("Stopped by SIGTERM between two batches. Run the same command again.")


class Watcher:
    """Context that turns SIGTERM into a flag; restores the previous handler on leaving.

    Outside the main thread, where Python installs no handlers, the flag can still be raised by
    `request()`.

    Args:
      together: the processes of a job stop at one and the same step, asked with `requested_at`; if
        each stopped at the step where its own signal came, the others would wait for it for ever.
    """

    def __init__(self, together: bool = False) -> None:
        self._event = threading.Event()
        self._installed = False
        self._together = together and jax.process_count() > 1

    def __enter__(self) -> "Watcher":
        # Between processes JAX carries the news; it listens to SIGTERM since the job was joined.
        if not self._together and threading.current_thread() is threading.main_thread():
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
        if self._together:
            signal.raise_signal(signal.SIGTERM)
        self._event.set()

    @property
    def requested(self) -> bool:
        """True once SIGTERM has arrived at this process."""
        return self._event.is_set()

    def requested_at(self, step: int) -> bool:
        """True in all processes at the same step, soon after SIGTERM has arrived at any of them.

        Args:
          step: grows from call to call, and is the same in all processes.
        """
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def poll(self) -> None:
        """Raises Interrupted once SIGTERM has arrived; for work that may be given up half done.

        Between processes it does nothing: they would not all give up at the same place.
        """
        if self.requested and not self._together:
            raise Interrupted("SIGTERM")
