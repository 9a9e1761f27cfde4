"""KILT's tasks as the Hugging Face hub keeps them (`facebook/kilt_tasks`), read as KILT's own lines.

A table has no absent fields, so that there -1, 0 and "" stand for what a JSON line leaves out:

    {"id": "q1", "input": "who", "meta": {"left_context": "", …}, "output": [{"answer": "x", "meta":
     {"score": 0}, "provenance": [{"wikipedia_id": "7", "title": "T", "section": "", "start_paragraph_id":
     1, "start_character": -1, …, "bleu_score": -1.0, "meta": {"annotation_id": "-1", …}}]}]}

becomes

    {"id": "q1", "input": "who", "output": [{"answer": "x", "provenance": [{"wikipedia_id": "7", "title":
     "T", "start_paragraph_id": 1}]}], "meta": {}}
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of provenance; the tasks' own `meta` is read by nobody.
_TEXTS = ("wikipedia_id", "title", "section")
_NUMBERS = (
    "start_paragraph_id",
    "start_character",
    "end_paragraph_id",
    "end_character",
    "bleu_score",
)
_COLUMNS = ("id", "input", "output")


def rows(path: str | Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a few at a time; other columns are not read.

    Raises ValueError where the file is missing, is no Parquet, or lacks a column, and without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs pyarrow. Install it (pip install glimmer-jax[parquet])."
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise ValueError(f"No file {path}. Check the path.") from None
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}. Copy it again.") from None
    with file:
        if missing := sorted(set(columns) - set(file.schema_arrow.names)):
            raise ValueError(
                f"{path}: wanted the columns {', '.join(columns)}, and there is no "
                f"{', '.join(missing)}. Give the hub's file."
            )
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                yield from batch.to_pylist()
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{path} is damaged after row {number}: {str(error).splitlines()[0]}. Copy it again."
            ) from None


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, line) of a task's file. Raises ValueError as `rows`."""
    for number, row in enumerate(rows(path, _COLUMNS), start=1):
        outputs = [_output(one) for one in row["output"] or ()]
        yield number, {"id": row["id"], "input": row["input"], "output": outputs, "meta": {}}


def _output(one: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"provenance": [_provenance(p) for p in one["provenance"] or ()]}
    return {"answer": one["answer"], **kept} if one["answer"] else kept


def _provenance(one: dict[str, Any]) -> dict[str, Any]:
    texts = {name: one[name] for name in _TEXTS if one.get(name)}
    numbers = {name: one[name] for name in _NUMBERS if (one.get(name) or 0) >= 0}
    return texts | {name: number for name, number in numbers.items() if number is not None}
