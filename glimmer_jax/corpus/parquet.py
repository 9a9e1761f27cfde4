"""Rows of a Parquet file of passages, a few at a time."""

from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

WANTED = ("id", "title", "text")
# Any other column (vectors, links) may be larger than the text and is not read.
CARRIED = ("page", "paragraphs", "chunk", "split")
_ROWS = 1024


def read_rows(path: str, on_read: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, record) of each row; an id of digits becomes a number.

    Raises ValueError where pyarrow is missing, the file is no Parquet or lacks a column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'glimmer-jax[parquet]'.") from None
    with epath.Path(path).open("rb") as opened:
        try:
            file = parquet.ParquetFile(opened)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not Parquet: {error}. Copy it again.") from None
        names = file.schema_arrow.names
        if missing := [name for name in WANTED if name not in names]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}. Rename its "
                "columns to id, title and text."
            )
        columns = [name for name in (*WANTED, *CARRIED) if name in names]
        size, count = epath.Path(path).stat().length, max(file.metadata.num_rows, 1)
        number = 0
        try:
            for batch in file.iter_batches(_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    identifier = record["id"]
                    if (
                        isinstance(identifier, str)
                        and identifier.isascii()
                        and identifier.isdigit()
                    ):
                        record["id"] = int(identifier)
                    yield number, {k: v for k, v in record.items() if v is not None or k in WANTED}
                on_read(size * batch.num_rows // count)
        except (pyarrow.ArrowException, OSError) as error:
            # What the system reports has a number and is no fault of the file.
            if getattr(error, "errno", None) is not None:
                raise
            raise ValueError(
                f"{path} is damaged after row {number}: {str(error).splitlines()[0]}. Copy it again."
            ) from None
