"""Task files in KILT's JSON Lines, before and after retrieval, or as Parquet on the Hugging Face hub.

    {"id": "which_function/json.dump/0", "input": "obj as formatted stream to file-like",
     "output": [{"answer": "json.dump", "provenance": [{"wikipedia_id": "json.dump", "title": "json.dump",
                 "start_paragraph_id": 0, "end_paragraph_id": 0, "bleu_score": 1.0}]}],
     "meta": {},
     "retrieved": [{"id": 81985529216486895, "score": 11.3, "gold": true}]}      # after retrieval

Null equals absent. Test files of the KILT benchmark have no output, which reads as an example without
answers. Its TriviaQA files have no questions either; `kilt.files` reads those from TriviaQA's own files.

A table has no absent fields. The hub's (`facebook/kilt_tasks`) write -1, 0 and "" where KILT leaves
a field out,

    {"id": "q1", "input": "who", "meta": {"left_context": "", …}, "output": [{"answer": "x", "meta":
     {"score": 0}, "provenance": [{"wikipedia_id": "7", "title": "T", "section": "", "start_paragraph_id":
     1, "start_character": -1, …, "bleu_score": -1.0, "meta": {"annotation_id": "-1", …}}]}]}

and are read as

    {"id": "q1", "input": "who", "output": [{"answer": "x", "provenance": [{"wikipedia_id": "7", "title":
     "T", "start_paragraph_id": 1}]}], "meta": {}}
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glimmer_jax.storage.json_lines import read_json_lines
from glimmer_jax.storage.parquet import read_rows

# Fields of provenance. Nothing reads the tasks' own `meta`.
_TEXTS = ("wikipedia_id", "title", "section")
_NUMBERS = (
    "start_paragraph_id",
    "start_character",
    "end_paragraph_id",
    "end_character",
    "bleu_score",
)


def read_examples(
    path: str | Path, questions: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Checked examples of a task file, in order.

    Args:
      path: JSON Lines, plain or gzip, or Parquet.
      questions: by id, for lines whose `input` is missing or empty.

    Raises:
      ValueError: naming file and line, for invalid JSON, a missing or invalid field, or a repeated
        id.
    """
    read = read_parquet if Path(path).suffix == ".parquet" else read_json_lines
    ids: set[str] = set()
    for number, line in read(path):
        example = _complete(line, questions or {})
        problem = check_example(example)
        if problem is None and example["id"] in ids:
            problem = f"the id {example['id']!r} occurs more than once; ids must be unique"
        if problem is not None:
            raise ValueError(f"{path}:{number}: {problem}.")
        ids.add(example["id"])
        yield example


def without_nulls(example: Mapping[str, Any]) -> dict[str, Any]:
    """The example without fields that are null, in itself, its outputs and their provenance."""
    kept = _present(example)
    if _is_list_of_objects(kept.get("output")):
        kept["output"] = [_present(output) for output in kept["output"]]
        for output in kept["output"]:
            if _is_list_of_objects(output.get("provenance")):
                output["provenance"] = [_present(place) for place in output["provenance"]]
    return kept


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _complete(example: dict[str, Any], questions: Mapping[str, str]) -> dict[str, Any]:
    """The example with a string id (older data sets number theirs) and its question, without nulls."""
    example = without_nulls(example)
    if type(example.get("id")) is int:
        example = {**example, "id": str(example["id"])}
    name = example.get("id")
    if not example.get("input") and isinstance(name, str) and name in questions:
        example = {**example, "input": questions[name]}
    return example


def check_example(example: Mapping[str, Any]) -> str | None:
    """The problem of an invalid example as a message; None for a valid example."""
    if not isinstance(example.get("id"), str) or not example["id"]:
        return f"expected a string `id`, got {example.get('id')!r}"
    if example.get("input") in (None, ""):
        return _missing_question(example)
    if not isinstance(example["input"], str) or not example["input"].strip():
        return f"expected a question in `input`, got {example['input']!r}"
    outputs = example.get("output", [])
    if not _is_list_of_objects(outputs):
        return "expected a list of objects in `output`"
    for output in outputs:
        if not isinstance(output.get("answer", ""), str):
            return f"expected a string `answer`, got {output['answer']!r}"
        places = output.get("provenance", [])
        if not _is_list_of_objects(places):
            return "expected a list of objects in `provenance`"
        for place in places:
            for name in ("wikipedia_id", "title"):
                if place.get(name) is not None and type(place[name]) not in (int, str):
                    return f"expected a string, an integer or null in `{name}`, got {place[name]!r:.80}"
            for name in ("start_paragraph_id", "end_paragraph_id", "bleu_score"):
                if not isinstance(place.get(name), int | float | None):
                    return f"expected a number or null in `{name}`, got {place[name]!r}"
    return _check_retrieved(example.get("retrieved", []))


def _missing_question(example: Mapping[str, Any]) -> str:
    others = [name for name, value in example.items() if name != "id" and isinstance(value, str)]
    if texts := [f"`{name}`" for name in others if example[name].strip()]:
        return (
            f"{example['id']!r} has {', '.join(texts)} but no `input`. Rename the field of the question "
            "to `input`"
        )
    return (
        f"{example['id']!r} has no question in `input`. KILT's TriviaQA files hold only ids: set "
        "TRIVIAQA, a pattern of TriviaQA's own files with all its splits"
    )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _check_retrieved(retrieved: Any) -> str | None:
    if not isinstance(retrieved, list):
        return "expected a list in `retrieved`"
    for passage in retrieved:
        if not isinstance(passage, dict) or type(passage.get("id")) not in (int, str):
            return f"expected {{'id': …}} in `retrieved`, got {json.dumps(passage)[:80]}"
        if passage.get("gold") not in (None, False, True):
            return f"expected true or false in `gold`, got {passage['gold']!r:.80}"
    return None


def answers(example: Mapping[str, Any]) -> list[str]:
    """Distinct answers, in order; KILT also lists outputs with provenance only."""
    texts = [output["answer"] for output in example.get("output", []) if output.get("answer")]
    return list(dict.fromkeys(texts))


def provenance(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The provenance of all answers."""
    outputs = example.get("output", [])
    return [place for output in outputs for place in output.get("provenance", [])]


def read_parquet(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, line) of a task's table. Raises ValueError as `parquet.read_rows`."""
    for number, row in enumerate(read_rows(path, ("id", "input", "output")), start=1):
        outputs = row["output"]
        if _is_list_of_objects(outputs):
            outputs = [_output(output) for output in outputs]
        yield number, {"id": row["id"], "input": row["input"], "output": outputs, "meta": {}}


def _output(output: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"answer": output["answer"]} if output.get("answer") else {}
    places = output.get("provenance") or []
    if _is_list_of_objects(places):
        places = [_provenance(place) for place in places]
    return fields | {"provenance": places}


def _provenance(place: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: place[name] for name in _TEXTS if place.get(name)}
    numbers = {name: place[name] for name in _NUMBERS if place.get(name) is not None}
    # What is no number stays, and is rejected with its line. NaN is how pandas writes null.
    absent = {name for name, x in numbers.items() if isinstance(x, int | float) and not x >= 0}
    return texts | {name: number for name, number in numbers.items() if name not in absent}
