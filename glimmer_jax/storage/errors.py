"""What a library's error says of storage: it failed for a while, it refused, or it is full.

Our own readers and writers say so themselves (`folder.unreachable`). Checkpoints and metrics are
written by Orbax, TensorStore and TensorFlow, whose errors come up as they are.
"""

import errno
import re

# How TensorStore's ValueErrors begin, and what TensorFlow's error classes are called.
_LATER = re.compile(
    r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): |(Unavailable|DeadlineExceeded|Aborted)Error$"
)
_REFUSED = re.compile(
    r"(PERMISSION_DENIED|UNAUTHENTICATED): |(PermissionDenied|Unauthenticated)Error$"
)
_FULL = re.compile(r"No space left on device|Disk quota exceeded")


def explain(error: BaseException) -> tuple[str, bool] | None:
    """What to say of an error, and whether the same command may succeed later; None: not storage's.

    Args:
      error: with what it came from, if that is known.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return _full(cause)
        # A pipe is what our own output goes through.
        if isinstance(cause, (ConnectionError, TimeoutError)) and not isinstance(
            cause, BrokenPipeError
        ):
            return _later(cause)
        # The name for TensorFlow, which need not be there; a ValueError's words for TensorStore. XLA has
        # the same words for what a device lacks.
        about = str(cause) if isinstance(cause, ValueError) else type(cause).__name__
        if isinstance(cause, ValueError) and _FULL.search(about):
            return _full(cause)
        if _LATER.match(about):
            return _later(cause)
        if _REFUSED.match(about):
            return f"The storage refused: {cause} Check permissions and credentials.", False
        cause = cause.__cause__
    return None


def _later(error: BaseException) -> tuple[str, bool]:
    return f"The storage did not answer: {error} Run the same command again.", True


def _full(error: BaseException) -> tuple[str, bool]:
    return (
        f"The storage is full: {error}. What was finished before is kept. Make room, and run the same "
        "command again.",
        False,
    )
