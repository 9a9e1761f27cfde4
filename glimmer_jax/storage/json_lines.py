"""JSON Lines, read strictly and written atomically.

Values that Python's json accepts silently are rejected: NaN and infinities, repeated keys, lone
surrogates. Every message names the file and the line.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from glimmer_jax.storage.folder import writing
from glimmer_jax.storage.lines import MAX_LINE, Span, is_regular_file, read_lines


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of each line that is not blank, of a plain or gzip file.

    Raises ValueError with file and line where a line is not one JSON object in UTF-8, and where the
    file is missing or cannot be read (`lines.read_lines`).
    """
    for line in read_lines(Span(regular_file(path))):
        where = f"{path}:{line.number}"
        if line.data is None:
            raise ValueError(
                f"{where}: the line is longer than {MAX_LINE} bytes. Split the record."
            )
        if line.data.strip():
            yield line.number, parse_line(line.data, where)


def regular_file(path: str | Path) -> str:
    """The path. Raises ValueError where there is no file, or a pipe, socket or device that may block."""
    if not is_regular_file(path):
        kind = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"No file: {path} {kind}. Check the path, or write the file first.")
    return str(path)


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line as an object; `where` names it in messages. Raises ValueError."""
    try:
        value = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_distinct_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        # Half a pair can only come from an escape: UTF-8 has none.
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: a string holds half of a surrogate pair, which is no character. Correct the "
            "program that wrote the line."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected UTF-8, got {error}. Re-encode the file.") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be read. Flatten the line.") from None
    except ValueError as error:
        raise ValueError(
            f"{where}: not a JSON object: {error}. Each line must hold one complete object; a truncated "
            "last line means that the file was not copied completely."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: expected a JSON object like {{...}}, got {type(value).__name__}. Each line "
            "must hold one object."
        )
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r} occurs twice")
            seen.add(name)
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits} is too large a number")
    return number


def dump_line(record: dict[str, Any]) -> str:
    """One record as its line, newline included. Raises ValueError for NaN and infinities."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_lines(
    path: str | os.PathLike,
    records: Iterable[dict[str, Any]],
    before: Callable[[Path], None] | None = None,
) -> int:
    """Writes records atomically, also to a bucket; returns their number.

    Args:
      path: local or in a bucket.
      records: the lines.
      before: called with the complete file on a local disk, before it appears at `path`.
    """
    count = 0
    with writing(path, before=before) as file:
        for record in records:
            file.write(dump_line(record).encode("utf-8"))
            count += 1
    return count
