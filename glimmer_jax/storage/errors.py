"""Classifies errors of disks and buckets: temporary, invalid input, or a bug.

`main` turns that into an exit code: 42 only for what is listed here as temporary, 2 for what the
user must change first, 1 for anything unknown. Our own readers and writers raise `StorageError`.
Orbax, TensorStore and TensorFlow raise errors of their own, which are recognised by number or
status.
"""

import errno
import re
from typing import Literal

Kind = Literal["temporary", "permanent"]

_TEMPORARY_ERRNO = {
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ESTALE, errno.EAGAIN,
    errno.EINTR, errno.EBUSY,
}  # fmt: skip
_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT}
_PERMANENT_ERRNO = _FULL_ERRNO | {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG, errno.EXDEV, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTCONN, errno.ENOMEM,
    *([errno.EUCLEAN] if hasattr(errno, "EUCLEAN") else []),
}  # fmt: skip
# TensorStore raises ValueErrors that begin with a status; TensorFlow has an error class for each.
_TEMPORARY = re.compile(
    r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): |(Unavailable|DeadlineExceeded|Aborted)Error$"
)
# The status of a rate limit (HTTP 429) is that of a full disk, without its words.
_LIMITED = re.compile(r"RESOURCE_EXHAUSTED: ")
_DENIED = re.compile(
    r"(PERMISSION_DENIED|UNAUTHENTICATED): |(PermissionDenied|Unauthenticated)Error$"
)
_DAMAGED = re.compile(r"DataLossError$")
_MISSING = re.compile(r"NotFoundError$")
_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class StorageError(OSError):
    """A file could not be read or written; raised from the library's error, which says why."""


class DamagedData(ValueError):
    """Bytes of a file are missing, or differ from those that were written."""


def storage_error(where: str, error: Exception) -> StorageError:
    """The error to raise, `from error`, where a library could not reach a file."""
    return StorageError(
        f"{where} could not be read or written: {error}. Check the path, the connection, permissions "
        "and free space, and run the same command again."
    )


def classify_error(error: BaseException) -> Kind | None:
    """Whether the same command may succeed later without a change; None: not storage's error."""
    match = _find(error)
    return None if match is None else match[1]


def describe_error(error: BaseException) -> str:
    """The message for an error that `classify_error` knows."""
    match = _find(error)
    assert match is not None
    cause, kind = match
    if isinstance(error, StorageError):
        return str(error)
    if _is_full(cause):
        return (
            f"The storage is full: {cause}. What was finished before is kept. Make room, and run the "
            "same command again."
        )
    if kind == "temporary":
        return f"The storage did not answer: {cause} Run the same command again."
    if _DAMAGED.match(_status(cause)):
        return f"A file is damaged: {cause}. Write or copy it again."
    if _DENIED.match(_status(cause)):
        return f"The storage denied access: {cause} Check permissions and credentials."
    return f"{cause}. Check the path, permissions and limits of the disk."


def _find(error: BaseException) -> tuple[BaseException, Kind] | None:
    """The error in the chain of causes that storage raised, and its kind."""
    ours = None
    cause: BaseException | None = error
    while cause is not None:
        if (kind := _kind(cause)) is not None:
            return cause, kind
        if isinstance(cause, StorageError):
            ours = ours or cause
        cause = cause.__cause__
    return None if ours is None else (ours, "permanent")


def _kind(error: BaseException) -> Kind | None:
    number = _errno(error)
    if number is not None:
        if number in _TEMPORARY_ERRNO:
            return "temporary"
        return "permanent" if number in _PERMANENT_ERRNO else None
    if isinstance(error, (ConnectionError, TimeoutError)):
        # A broken pipe is where our own output goes.
        return None if isinstance(error, BrokenPipeError) else "temporary"
    status = _status(error)
    if _is_full(error):
        return "permanent"
    if _TEMPORARY.match(status) or _LIMITED.match(status):
        return "temporary"
    permanent = _DENIED.match(status) or _DAMAGED.match(status) or _MISSING.match(status)
    return "permanent" if permanent else None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # TensorStore's errors of the local disk carry the number in their text.
    number = _OS_ERROR.search(str(error)) if isinstance(error, ValueError) else None
    return None if number is None else int(number[1])


def _is_full(error: BaseException) -> bool:
    return _errno(error) in _FULL_ERRNO or (
        (isinstance(error, ValueError) or type(error).__name__ == "ResourceExhaustedError")
        and bool(_FULL.search(str(error)))
    )


def _status(error: BaseException) -> str:
    # TensorStore's text; TensorFlow need not be installed, so its classes are known by name. XLA
    # uses the same words for devices, in errors that are no ValueErrors.
    return str(error) if isinstance(error, ValueError) else type(error).__name__
