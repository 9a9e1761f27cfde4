"""The very end of a process: what is done after all else, directly before the process is gone.

A finished output's lock is released here, after JAX has left the job: of a process that is killed before,
the restarted command recognises the output as its own.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable

_callbacks: list[Callable[[], None]] | None = None
_code: int | None = None


def install() -> None:
    """Makes `before_end` wait for the end of this process; call it before JAX is imported."""
    global _callbacks
    if _callbacks is None:
        _callbacks = []
        # The first function registered is the last to run.
        atexit.register(_end)


def before_end(callback: Callable[[], None]) -> None:
    """Calls a function at the end of the process, or at once without `install`."""
    if _callbacks is None:
        callback()
    else:
        _callbacks.append(callback)


def end_with(code: int) -> None:
    """The work is done: the process ends with this code right after the callbacks.

    Without this, Python and the libraries would free their memory first, for up to a second.
    """
    global _code
    _code = code


def _end() -> None:
    while _callbacks:
        _callbacks.pop()()
    if _code is not None:
        with contextlib.suppress(OSError):  # What JAX or an exit handler printed has no reader.
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_code)
