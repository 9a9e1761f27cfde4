"""Rows of a Parquet file of passages."""

from collections.abc import Callable, Iterator
from typing import Any

from glimmer_jax.storage import parquet

WANTED = ("id", "title", "text")
# Any other column (vectors, links) may be larger than the text and is not read.
CARRIED = ("page", "paragraphs", "chunk", "split")


def read_rows(path: str, on_read: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, record) of each row; an id of digits becomes a number.

    Raises ValueError as `parquet.read_rows`.
    """
    rows = parquet.read_rows(path, WANTED, CARRIED, on_read)
    for number, record in enumerate(rows, start=1):
        identifier = record["id"]
        if isinstance(identifier, str) and identifier.isascii() and identifier.isdigit():
            record["id"] = int(identifier)
        yield number, {k: v for k, v in record.items() if v is not None or k in WANTED}
