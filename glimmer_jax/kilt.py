"""Task files in KILT's JSON Lines, before and after retrieval.

    {"id": "which_function/json.dump/0", "input": "obj as formatted stream to file-like",
     "output": [{"answer": "json.dump", "provenance": [{"wikipedia_id": "json.dump", "title": "json.dump",
                 "start_paragraph_id": 0, "end_paragraph_id": 0, "bleu_score": 1.0}]}],
     "meta": {},
     "retrieved": [{"id": 81985529216486895, "score": 11.3, "gold": true}]}      # after retrieval

Test files of the KILT benchmark carry no output: an example without answers is read as such.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glimmer_jax.json_lines import parse_line, read_json_lines

ON_ERROR = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to do with lines that break the format.

    Attributes:
      on_error: "raise" ends with file and line; "skip" leaves the line out and counts it.
      max_skipped: with "skip", more bad lines than this raise all the same.
    """

    on_error: str = "raise"
    max_skipped: int = 100

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {ON_ERROR}, got {self.on_error!r}.")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped must be 0 or more, got {self.max_skipped}.")


def read_examples(path: str | Path, policy: Policy = Policy()) -> Iterator[dict[str, Any]]:
    """Examples of a task file, checked; lines are named `file:line` in every message.

    Raises ValueError for bad JSON, a missing or wrong field, an id given twice, or, when skipping,
    more than `policy.max_skipped` such lines.
    """
    seen: set[str] = set()
    skipped = 0
    for number, example, problem in _lines(path, policy):
        where = f"{path}:{number}"
        if problem is None:
            problem = check_example(example)
        if problem is None and example["id"] in seen:
            problem = f"the id {example['id']!r} was given before; ids must be unique"
        if problem is None:
            seen.add(example["id"])
            yield example
            continue
        skipped += 1
        if policy.on_error == "raise":
            raise ValueError(problem if problem.startswith(where) else f"{where}: {problem}.")
        if skipped > policy.max_skipped:
            raise ValueError(
                f"{path}: more than {policy.max_skipped} bad lines, the last at {where}: {problem}. "
                "Repair the file, or raise max_skipped."
            )


def _lines(path: str | Path, policy: Policy) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    if policy.on_error == "raise":
        for number, example in read_json_lines(path):
            yield number, example, None
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse_line(line, f"{path}:{number}"), None
            except ValueError as error:
                yield number, {}, str(error)


def check_example(example: dict[str, Any]) -> str | None:
    """What is wrong with an example, or None."""
    if not isinstance(example.get("id"), str) or not example["id"]:
        return f"wanted a string `id`, got {example.get('id')!r}"
    if not isinstance(example.get("input"), str) or not example["input"].strip():
        return f"wanted a question in `input`, got {example.get('input')!r}"
    outputs = example.get("output", [])
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        return "wanted a list of objects in `output`"
    for one in outputs:
        if not isinstance(one.get("answer", ""), str):
            return f"wanted a string `answer`, got {one['answer']!r}"
        provenance = one.get("provenance", [])
        if not isinstance(provenance, list) or not all(isinstance(p, dict) for p in provenance):
            return "wanted a list of objects in `provenance`"
    return _check_retrieved(example.get("retrieved", []))


def _check_retrieved(retrieved: Any) -> str | None:
    if not isinstance(retrieved, list):
        return "wanted a list in `retrieved`"
    for one in retrieved:
        if not isinstance(one, dict) or type(one.get("id")) is not int:
            return f"wanted {{'id': integer, …}} in `retrieved`, got {json.dumps(one)[:80]}"
    return None


def answers(example: Mapping[str, Any]) -> list[str]:
    """Distinct answers, in order; KILT also lists outputs with provenance only."""
    found = [one["answer"] for one in example.get("output", []) if one.get("answer")]
    return list(dict.fromkeys(found))


def provenance(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All provenance of all answers."""
    return [one for output in example.get("output", []) for one in output.get("provenance", [])]


def is_gold(record: Mapping[str, Any], where: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a passage answers: its page, and where both name one its paragraph, in `where`.

    Passages name their page by its `wikipedia_id` in `page`, or by `title` alone, and their paragraph
    in `chunk`. What either side leaves out, null included, is not compared.
    """
    page, chunk = record.get("page", record.get("title")), record.get("chunk")
    for one in where:
        # Ids are compared with ids: a title may look like another page's id.
        named = one.get("wikipedia_id") if "page" in record else one.get("title")
        if page is None or named is None or str(page) != str(named):
            continue
        first, last = one.get("start_paragraph_id"), one.get("end_paragraph_id")
        if chunk is None or first is None:
            return True
        if first <= chunk <= (first if last is None else last):
            return True
    return False
