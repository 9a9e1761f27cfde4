"""Corpus files by name, pattern or `gs://` path, and the spans that they are read in.

Access is etils' `epath`, as for checkpoints: a bucket needs what epath needs for it (tensorflow or
gcsfs). Patterns may use `*`, `?` and `[…]` in any part of a path.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

SPAN_BYTES = 64 * 2**20
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_WILD = re.compile(r"[*?\[]")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)?")


class Span(NamedTuple):
    """The lines that begin in bytes [start, end) of a file; up to its end for None."""

    path: str
    start: int = 0
    end: int | None = None


def find_files(pattern: str) -> list[str]:
    """Paths that match, sorted; a name without wildcards is one file.

    Raises ValueError where nothing matches, and where shards `…-00003-of-00008…` have gaps.
    """
    if epath.Path(pattern).is_file():
        return [pattern]
    if not _WILD.search(pattern):
        raise ValueError(f"CORPUS: there is no file {pattern}. Check the path.")
    parts = pattern.split("/")
    first = next(place for place, part in enumerate(parts) if _WILD.search(part))
    root = "/".join(parts[:first]) + ("/" if first else "")
    found = epath.Path(root or ".").glob("/".join(parts[first:]))
    paths = sorted(str(path) for path in found if path.is_file())
    if not paths:
        raise ValueError(f"CORPUS: no file matches {pattern}. Check the pattern.")
    _check_shards(paths)
    return paths


def _check_shards(paths: list[str]) -> None:
    sets: dict[tuple[str, int, str], set[int]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path):
            key = match[1], int(match[3]), match[4] or ""
            sets.setdefault(key, set()).add(int(match[2]))
    for (stem, count, ending), numbers in sets.items():
        if missing := sorted(set(range(count)) - numbers):
            raise ValueError(
                f"{len(missing)} of {count} shards are missing, the first is "
                f"{stem}-{missing[0]:05d}-of-{count:05d}{ending}. Copy or write the corpus again."
            )


def check_encoding(path: str) -> bytes:
    """The first bytes of a file. Raises ValueError where they are UTF-16's or another packer's."""
    with epath.Path(path).open("rb") as file:
        head = file.read(64)
    known = head.startswith((GZIP, PARQUET))
    if head.startswith(_UTF16_MARKS) or (b"\0" in head and not known):
        raise ValueError(
            f"{path} is neither UTF-8 nor gzip: it begins as UTF-16 or a packed file does. Convert it, "
            "for instance with iconv -f UTF-16 -t UTF-8, or unpack it."
        )
    return head


def make_spans(paths: Iterable[str], span_bytes: int = SPAN_BYTES) -> Iterator[Span]:
    """Spans of about `span_bytes`, in order; files that cannot be entered midway are one span.

    Raises ValueError as `check_encoding`.
    """
    for path in paths:
        head = check_encoding(path)
        size = epath.Path(path).stat().length
        if head.startswith((GZIP, PARQUET)) or size <= span_bytes:
            yield Span(path)
            continue
        for start in range(0, size, span_bytes):
            yield Span(path, start, min(start + span_bytes, size))
