"""The stop signal: SIGTERM, Ctrl-C and SIGHUP set a flag, loops poll it, and the process ends with 42.

A preempted machine sends SIGTERM and allows some seconds. The handler only sets a flag, since an
exception raised from a handler can be swallowed (in a finaliser or a garbage-collection callback) or
wrapped into another error. Loops poll the flag between two units of work. `StopRequested` derives from
BaseException, so that `except Exception` in a library does not stop it on its way to `main`.

Some work cannot poll: imports, the initialisation of a backend, compilation. A watchdog thread learns
of the signal even while the main thread runs native code. It ends the process with the same exit code
when nothing has polled for `grace` seconds, or when a second signal arrives. That loses work but never
corrupts a file, because every file and checkpoint counts only once it is complete: files are renamed
into place, shards count by their record, and checkpoints by their checksums.

In a job of many processes JAX forwards a SIGTERM of one process to all and chooses the step at which
`agreed` becomes true in all.
"""

import atexit
import contextlib
import ctypes
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from glimmer_jax.runtime import exit_codes

T = TypeVar("T")

GRACE_SECONDS = 10.0
# `timeout` and process groups may deliver one request twice; the copies arrive together.
_REPEAT_SECONDS = 1.0
_TICK_SECONDS = 0.25


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask for a stop; SIGHUP too, unless it is ignored, as under nohup."""
    asked = (signal.SIGTERM, signal.SIGINT)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return asked if ignored else (*asked, signal.SIGHUP)


class StopRequested(BaseException):
    """The process was asked to stop; finished work is saved, and the same command resumes."""


class StopSignal:
    """Whether this process was asked to stop. `STOP` is the instance of this process."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._signal = signal.SIGTERM
        self._grace = GRACE_SECONDS
        self._received_at: float | None = None  # written and read by the watchdog alone
        self._last_poll = 0.0
        self._acknowledged = False
        self._agreed = False
        self._polls = itertools.count()  # of all loops together: JAX's step counter
        self._final_code: int | None = None
        self._deferring = threading.local()
        self._previous: dict[int, tuple[Any, _NativeHandler]] = {}  # empty: not installed
        self._notify_jax: Callable[[int], Any] | None = None

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop. A caller that sees True saves and ends its work."""
        self._acknowledged |= self._requested.is_set()
        self._last_poll = time.monotonic()
        return self._requested.is_set()

    def poll(self, message: str = "") -> None:
        """Raises StopRequested if this process was asked to stop.

        For work that each process does independently; `poll_together` is for work that all share.
        """
        if self.requested and not self._deferred:
            raise StopRequested(message or self._default_message)

    @property
    def _deferred(self) -> bool:
        return getattr(self._deferring, "on", False)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, polls of this thread do not stop a job of one process: the server answers requests
        under way after the signal."""
        before, self._deferring.on = self._deferred, True
        try:
            yield
        finally:
            self._deferring.on = before

    def agreed(self) -> bool:
        """Whether all processes of the job stop here; true in all of them at the same call.

        All processes must make the same sequence of calls. It stays true. Alone, it is `requested`.
        """
        import jax

        if jax.process_count() == 1:
            return self.requested and not self._deferred
        from jax.experimental import multihost_utils

        if not self._agreed:
            # True for a single step number, which JAX chooses ahead of all processes.
            self._agreed = multihost_utils.reached_preemption_sync_point(next(self._polls))
        self._acknowledged |= self._agreed
        self._last_poll = time.monotonic()
        return self._agreed

    def poll_together(self, message: str = "") -> None:
        """Raises StopRequested in all processes of the job at the same call, see `agreed`."""
        if self.agreed():
            raise StopRequested(message or self._default_message)

    def polling(self, items: Iterable[T], every: int = 1024) -> Iterator[T]:
        """The items, the same in all processes, with `poll_together` before each `every` of them."""
        for index, item in enumerate(items):
            if index % every == 0:
                self.poll_together()
            yield item

    def request(self) -> None:
        """Asks the process to stop, as SIGTERM does."""
        self._on_signal(signal.SIGTERM, None)

    @contextlib.contextmanager
    def grace(self, seconds: float) -> Iterator[None]:
        """Inside, the watchdog waits `seconds` for a poll: longer where there is progress to save,
        0 where the process only waits for input."""
        previous, self._grace = self._grace, seconds
        try:
            yield
        finally:
            self._grace = previous

    @property
    def _default_message(self) -> str:
        return f"Stopped by {self._signal.name}. Run the same command again to resume."

    @property
    def exit_code(self) -> int:
        """The exit code of a process that ends because of the signal."""
        return exit_codes.INTERRUPTED if self._signal == signal.SIGINT else exit_codes.RETRY

    def finish(self, code: int) -> None:
        """The work ended with `code`: a later signal ends the process with it, too."""
        self._final_code = code

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles `stop_signals` inside. Nested contexts, and those of other threads, do nothing."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.install()
        try:
            yield
        finally:
            self._uninstall()

    def install(self) -> None:
        """Handles `stop_signals` for the rest of the process. Main thread only."""
        self._previous = {n: (signal.getsignal(n), _NativeHandler(n)) for n in stop_signals()}
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        self._wakeup = write_end, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self.reinstall()
        self._watchdog = threading.Thread(
            target=self._watch, args=(read_end,), name="stop-watchdog", daemon=True
        )
        self._watchdog.start()
        # The first function registered is the last to run: JAX leaves the job before it. Afterwards
        # Python removes its handlers, and a signal would replace the exit code.
        atexit.register(_ignore_signals)

    def _uninstall(self) -> None:
        atexit.unregister(_ignore_signals)
        for number, (handler, native) in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
            native.restore()  # Python knows nothing of a handler that it did not set.
        write_end, previous_fd = self._wakeup
        signal.set_wakeup_fd(previous_fd)
        os.close(write_end)
        self._watchdog.join()
        self._previous = {}
        self.clear()

    def reinstall(self) -> None:
        """Takes SIGTERM back from JAX, which sets a handler of its own when a job is joined.

        JAX's handler is called from ours, so that the other processes learn of the signal.
        """
        if not self._previous:
            return
        before = _NativeHandler(signal.SIGTERM).address
        for number in self._previous:
            signal.signal(number, self._on_signal)
        python = _NativeHandler(signal.SIGTERM).address
        if before not in (signal.SIG_DFL, signal.SIG_IGN, python):
            self._notify_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(before)

    def clear(self) -> None:
        """Forgets requests."""
        self._requested.clear()
        self._signal = signal.SIGTERM
        self._received_at = self._final_code = None
        self._acknowledged = self._agreed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Python runs handlers in the order of their numbers. A preempted job must be restarted, also
        # where its launcher sends both.
        if number == signal.SIGTERM:
            self._signal = signal.SIGTERM
        if not self._requested.is_set():
            self._signal = signal.Signals(number)
            self._requested.set()
            if self._notify_jax is not None:
                self._notify_jax(signal.SIGTERM)

    def _watch(self, read_end: int) -> None:
        while True:
            waiting = _TICK_SECONDS if self._requested.is_set() else None
            readable, _, _ = select.select([read_end], [], [], waiting)
            if readable:
                # Python writes the number of each signal here, also while the main thread is in C.
                received = os.read(read_end, 64)
                if not received:
                    os.close(read_end)
                    return
                for number in sorted(set(received) & self._previous.keys(), reverse=True):
                    self._receive(number)
            if self._received_at is not None and not self._acknowledged:
                if time.monotonic() >= max(self._received_at, self._last_poll) + self._grace:
                    self._end("nothing had to be saved")

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            self._on_signal(number, None)
        elif now - self._received_at >= _REPEAT_SECONDS:
            self._end("a second signal arrived")

    def _end(self, reason: str) -> None:
        if self._final_code is not None:
            os._exit(self._final_code)
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
        flushing.start()
        flushing.join(1.0)  # the main thread may hold the stream
        text = f"glimmer: Stopped at once by {self._signal.name}: {reason}. Run the same command again.\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(self.exit_code)


class _NativeHandler:
    """The handler of a signal at the level of the C library, whoever set it."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = int(number)
        self._libc = ctypes.CDLL(None)
        # `struct sigaction` begins with the handler's address and is much smaller than this.
        self._action = ctypes.create_string_buffer(1024)
        self._libc.sigaction(self._number, None, self._action)

    @property
    def address(self) -> int:
        return int.from_bytes(self._action.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder)

    def restore(self) -> None:
        self._libc.sigaction(self._number, self._action, None)


def _ignore_signals() -> None:
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


STOP = StopSignal()
