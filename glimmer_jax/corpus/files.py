"""Corpus files by name, pattern or `gs://` path, and the spans in which they are read.

Access goes through etils' `epath`, as for checkpoints: a bucket needs what epath needs for it
(tensorflow or gcsfs). Patterns may use `*`, `?` and `[…]` in any part of a path.
"""

import re
from collections.abc import Iterable, Iterator

from etils import epath

from glimmer_jax.storage.folder import local_path
from glimmer_jax.storage.lines import (
    GZIP,
    PARQUET,
    Span,
    check_encoding,
    file_size,
    is_regular_file,
)

SPAN_BYTES = 64 * 2**20
_WILDCARD = re.compile(r"[*?\[]")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)?")


def find_files(pattern: str) -> list[str]:
    """Matching paths, sorted; a name without wildcards is one file.

    Raises:
      ValueError: nothing matches, a match is a pipe, socket or device, or shards
        `…-00003-of-00008…` have gaps.
    """
    pattern = local_path(pattern)
    if is_regular_file(pattern):
        return [pattern]
    if not _WILDCARD.search(pattern):
        kind = "is not a regular file" if epath.Path(pattern).exists() else "does not exist"
        raise ValueError(f"CORPUS: {pattern} {kind}. Give a file or a pattern of files.")
    parts = pattern.split("/")
    if "**" in parts:
        raise ValueError(
            f"CORPUS: {pattern} holds **, which is not supported. Use one * for each folder, such as "
            "data/*/*.jsonl."
        )
    first = next(index for index, part in enumerate(parts) if _WILDCARD.search(part))
    root = "/".join(parts[:first]) + ("/" if first else "")
    matches = sorted(epath.Path(root or ".").glob("/".join(parts[first:])), key=str)
    paths = [str(path) for path in matches if not path.is_dir()]
    for path in paths:
        if not is_regular_file(path):
            raise ValueError(f"CORPUS: {path} is not a regular file. Narrow the pattern.")
    if not paths:
        raise ValueError(f"CORPUS: no file matches {pattern}. Check the pattern.")
    _check_shards(paths)
    return paths


def _check_shards(paths: list[str]) -> None:
    shards: dict[tuple[str, int, str], set[int]] = {}
    for path in paths:
        if match := _SHARD.fullmatch(path):
            key = match[1], int(match[3]), match[4] or ""
            shards.setdefault(key, set()).add(int(match[2]))
    for (stem, count, suffix), numbers in shards.items():
        missing = count - len(numbers)
        if missing > 0:
            first = next(number for number in range(count) if number not in numbers)
            raise ValueError(
                f"CORPUS: {missing} of {count} shards are missing, the first is "
                f"{stem}-{first:05d}-of-{count:05d}{suffix}. Copy or write the corpus again."
            )


def make_spans(paths: Iterable[str], span_bytes: int = SPAN_BYTES) -> Iterator[Span]:
    """Spans of about `span_bytes`, in order; a gzip or Parquet file is a single span.

    Raises ValueError as `check_encoding`.
    """
    for path in paths:
        head = check_encoding(path)
        size = file_size(path)
        if head.startswith((GZIP, PARQUET)) or size <= span_bytes:
            yield Span(path)
            continue
        for start in range(0, size, span_bytes):
            yield Span(path, start, min(start + span_bytes, size))
