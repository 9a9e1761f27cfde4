"""Numbered lines of plain and gzip files, from any offset, in bounded memory.

Lines end at `\\n` alone, since other line separators of Unicode may occur inside a string. Gzip is
recognised by its first bytes, and a UTF-8 byte order mark is dropped.

Three limits keep a damaged or hostile file from exhausting memory or time: a line longer than
`MAX_LINE` is skipped without being held, and `MAX_SKIPPED_BYTES` in one line or `MAX_BLANK_LINES` in a
row raise.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from glimmer_jax.storage.folder import in_bucket

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
# The longest pages of Wikipedia, with their links, are some megabytes.
MAX_LINE = 32 * 2**20
MAX_SKIPPED_BYTES = 2**30
MAX_BLANK_LINES = 10**6
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BUFFER = 2**20


class Span(NamedTuple):
    """The lines that begin in bytes [start, end) of a file; None for its end."""

    path: str
    start: int = 0
    end: int | None = None


class Line(NamedTuple):
    """One line.

    Attributes:
      number: from 1 at the start of the span.
      offset: byte where the line begins in the file; None in a gzip file.
      data: with the line end; None for a line longer than `MAX_LINE`.
    """

    number: int
    offset: int | None
    data: bytes | None


def is_regular_file(path: Any) -> bool:
    """Whether a path is a file, local or in a bucket: reading a pipe or a device may block forever.

    Raises ValueError for a URL of an unknown kind.
    """
    if not in_bucket(path):
        return os.path.isfile(path)
    try:
        return bool(epath.Path(path).is_file())
    except KeyError as error:
        raise ValueError(
            f"{path}: URLs of the kind {error} are not supported. Give a local path or a gs:// URL."
        ) from error


def file_size(path: Any) -> int:
    """Bytes of a file, local or in a bucket."""
    return epath.Path(path).stat().length


def check_encoding(path: str) -> bytes:
    """The first bytes of a file. Raises ValueError for UTF-16 and unknown binary formats."""
    with epath.Path(path).open("rb") as file:
        head = file.read(64)
    known = head.startswith((GZIP, PARQUET))
    if head.startswith(_UTF16_MARKS) or (b"\0" in head and not known):
        raise ValueError(
            f"{path}: expected UTF-8 or gzip, found UTF-16 or binary data. Convert the file, for "
            "example with iconv -f UTF-16 -t UTF-8, or unpack it."
        )
    return head


def _ignore(count: int) -> None:
    pass


def read_lines(span: Span, on_read: Callable[[int], None] = _ignore) -> Iterator[Line]:
    """The lines of a span, blank ones included.

    Args:
      span: what to read.
      on_read: called with the number of bytes at each read from the file.

    Raises:
      ValueError: as `check_encoding`; the gzip file is damaged or truncated; or a limit is exceeded.
    """
    if not span.start:
        check_encoding(span.path)
    with epath.Path(span.path).open("rb") as file:
        # The byte before `start` shows whether a line begins there.
        offset = max(span.start - 1, 0)
        if offset:
            file.seek(offset)
        raw = io.BufferedReader(_CountingReader(file, on_read), _BUFFER)
        if span.start:
            offset += _skip_line(raw, span.path)
        if span.start or raw.peek(2)[:2] != GZIP:
            yield from _split(raw, span.path, offset, span.end, seekable=True)
            return
        number = 0
        try:
            for line in _split(gzip.GzipFile(fileobj=raw), span.path, 0, None, seekable=False):
                number = line.number
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{span.path}: the gzip data is damaged or truncated after line {number}: {error}. "
                "Copy the file again."
            ) from None


class _CountingReader(io.RawIOBase):
    """A raw stream over any file with `read`, as those of buckets are; reports bytes read."""

    def __init__(self, file: Any, on_read: Callable[[int], None]):
        self._file = file
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._on_read(len(data))
        return len(data)


def _split(file: Any, path: str, offset: int, end: int | None, *, seekable: bool) -> Iterator[Line]:
    number = blank = 0
    while end is None or offset < end:
        data: bytes | None = file.readline(MAX_LINE + 1)
        if not data:
            return
        begin, number = offset, number + 1
        offset += len(data)
        if len(data) > MAX_LINE:
            if not data.endswith(b"\n"):
                offset += _skip_line(file, path)
            data = None
        elif number == 1 and not begin:
            data = data.removeprefix(_UTF8_MARK)
        blank = blank + 1 if data is not None and (not data or data.isspace()) else 0
        if blank > MAX_BLANK_LINES:
            raise ValueError(
                f"{path}:{number}: more than {MAX_BLANK_LINES} blank lines in a row. Check what the "
                "file holds."
            )
        yield Line(number, begin if seekable else None, data)


def _skip_line(file: Any, path: str) -> int:
    """Reads past the next line end; returns the number of bytes."""
    length = 0
    while part := file.readline(_BUFFER):
        length += len(part)
        if part.endswith(b"\n"):
            break
        if length > MAX_SKIPPED_BYTES:
            raise ValueError(
                f"{path}: a line is longer than {MAX_SKIPPED_BYTES} bytes. Check what the file holds."
            )
    return length
