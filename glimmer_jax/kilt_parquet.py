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

from glimmer_jax.parquet import read_rows

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


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, line) of a task's file. Raises ValueError as `parquet.read_rows`."""
    for number, row in enumerate(read_rows(path, _COLUMNS), start=1):
        outputs = [_output(one) for one in row["output"] or ()]
        yield number, {"id": row["id"], "input": row["input"], "output": outputs, "meta": {}}


def _output(one: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"provenance": [_provenance(p) for p in one["provenance"] or ()]}
    return {"answer": one["answer"], **kept} if one["answer"] else kept


def _provenance(one: dict[str, Any]) -> dict[str, Any]:
    texts = {name: one[name] for name in _TEXTS if one.get(name)}
    numbers = {name: one[name] for name in _NUMBERS if (one.get(name) or 0) >= 0}
    return texts | {name: number for name, number in numbers.items() if number is not None}
