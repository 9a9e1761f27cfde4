"""Numbered lines of plain and gzip files, from any place on, in little memory.

Lines end at `\\n` alone. A line longer than `MAX_LINE` is read past and never held: a file without
line ends must not fill the memory.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from glimmer_jax.corpus.files import GZIP, UTF8_MARK, Span, check_encoding

# The longest pages of Wikipedia, links and all, are some megabytes.
MAX_LINE = 32 * 2**20
_BUFFER = 2**20


class Line(NamedTuple):
    """One line; `number` counts from 1 at the start of the span.

    `offset` is the byte where it begins in the file, None in a gzip file; `data` is None for a line
    longer than `MAX_LINE`.
    """

    number: int
    offset: int | None
    data: bytes | None


class _Raw(io.RawIOBase):
    """A file that need only have `read`, as buckets' files do; tells how many bytes were read."""

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


def _ignore(count: int) -> None:
    pass


def read_lines(span: Span, on_read: Callable[[int], None] = _ignore) -> Iterator[Line]:
    """The lines of a span, blank ones too.

    Args:
      span: what to read.
      on_read: is called with the number of bytes each time that the file is read from.

    Raises ValueError as `check_encoding`, and for a gzip file that is damaged or cut short.
    """
    if not span.start:
        check_encoding(span.path)
    with epath.Path(span.path).open("rb") as file:
        # One byte early: whether a line begins at `start` is seen from the byte before.
        offset = max(span.start - 1, 0)
        if offset:
            file.seek(offset)
        raw = io.BufferedReader(_Raw(file, on_read), _BUFFER)
        if span.start:
            offset += _rest_of_line(raw)
        if span.start or raw.peek(2)[:2] != GZIP:
            yield from _split(raw, offset, span.end, known=True)
            return
        number = 0
        try:
            for line in _split(gzip.GzipFile(fileobj=raw), 0, None, known=False):
                number = line.number
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{span.path}: the gzip file is damaged or was not copied whole: {error} (after line "
                f"{number}). Copy it again."
            ) from None


def _split(file: Any, offset: int, end: int | None, known: bool) -> Iterator[Line]:
    number = 0
    while end is None or offset < end:
        data: bytes | None = file.readline(MAX_LINE + 1)
        if not data:
            return
        begin, number = offset, number + 1
        offset += len(data)
        if len(data) > MAX_LINE:
            if not data.endswith(b"\n"):
                offset += _rest_of_line(file)
            data = None
        elif number == 1 and not begin:
            data = data.removeprefix(UTF8_MARK)
        yield Line(number, begin if known else None, data)


def _rest_of_line(file: Any) -> int:
    """Reads past the next line end; returns the number of bytes."""
    length = 0
    while part := file.readline(_BUFFER):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length
