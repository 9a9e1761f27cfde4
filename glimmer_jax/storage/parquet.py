"""Rows of Parquet files, read in batches; columns that are not requested are not read."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from glimmer_jax.storage.json_lines import regular_file

_ROWS = 1024
# Besides its own errors, pyarrow raises these for damaged metadata and for values that do not decode.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


def read_rows(
    path: str | Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[dict[str, Any]]:
    """The rows of a file, on disk or in a bucket.

    Args:
      path: the file.
      columns: required columns.
      optional: columns that are read where they exist.
      on_read: called with the number of bytes read, estimated from the share of rows.

    Raises:
      ValueError: pyarrow or the file is missing, the file is not Parquet, lacks a column, or is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: Parquet needs pyarrow: pip install 'glimmer-jax[parquet]'."
        ) from None
    number = 0

    @contextlib.contextmanager
    def damage_named() -> Iterator[None]:
        try:
            yield
        except (pyarrow.ArrowException, *_DAMAGE) as error:
            # The system's errors have a number and are no fault of the file.
            if getattr(error, "errno", None) is not None:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} is not Parquet, or is damaged after row {number}: {reason}. Copy it again."
            ) from None

    place = epath.Path(regular_file(path))
    size = place.stat().length
    with place.open("rb") as opened:
        with damage_named():
            file = parquet.ParquetFile(opened)
            names = list(file.schema_arrow.names)
            count = max(file.metadata.num_rows, 1)
        if missing := [name for name in columns if name not in names]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}. Required are "
                f"{', '.join(columns)}: rename its columns, or give another file."
            )
        with damage_named():
            selected = [name for name in (*columns, *optional) if name in names]
            batches = file.iter_batches(_ROWS, columns=selected)
        while True:
            with damage_named():
                if (batch := next(batches, None)) is None:
                    return
                rows = batch.to_pylist()
            yield from rows
            number += len(rows)
            on_read(size * len(rows) // count)
