"""Rows of Parquet files, a few at a time; columns that nobody asks for are not read."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

_ROWS = 1024


def read_rows(
    path: str | Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[dict[str, Any]]:
    """The rows of a file, local or a bucket's.

    Args:
      path: of the file.
      columns: that it must have.
      optional: columns that are read where they are there.
      on_read: called with bytes of the file, by the share of its rows, as they are read.

    Raises:
      ValueError: pyarrow is missing, or the file is, is no Parquet, lacks a column or is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: Parquet needs pyarrow: pip install 'glimmer-jax[parquet]'."
        ) from None
    place = epath.Path(path)
    if not place.is_file():
        raise ValueError(f"No file {path}. Check the path.")
    with place.open("rb") as opened:
        try:
            file = parquet.ParquetFile(opened)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not Parquet: {error}. Copy it again.") from None
        names = file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}. Wanted are "
                f"{', '.join(columns)}: rename its columns, or give another file."
            )
        size, count = place.stat().length, max(file.metadata.num_rows, 1)
        number = 0
        try:
            wanted = [name for name in (*columns, *optional) if name in names]
            for batch in file.iter_batches(_ROWS, columns=wanted):
                yield from batch.to_pylist()
                number += batch.num_rows
                on_read(size * batch.num_rows // count)
        except (pyarrow.ArrowException, OSError) as error:
            # What the system reports has a number and is no fault of the file.
            if getattr(error, "errno", None) is not None:
                raise
            raise ValueError(
                f"{path} is damaged after row {number}: {str(error).splitlines()[0]}. Copy it again."
            ) from None
