"""Task files in KILT's JSON Lines, before and after retrieval.

    {"id": "which_function/json.dump/0", "input": "obj as formatted stream to file-like",
     "output": [{"answer": "json.dump", "provenance": [{"wikipedia_id": "json.dump", "title": "json.dump",
                 "start_paragraph_id": 0, "end_paragraph_id": 0, "bleu_score": 1.0}]}],
     "meta": {},
     "retrieved": [{"id": 81985529216486895, "score": 11.3, "gold": true}]}      # after retrieval

Test files of the KILT benchmark carry no output: an example without answers is read as such. Its
TriviaQA files carry no questions: `glimmer_jax.kilt.files` has them.

KILT's tasks as the Hugging Face hub keeps them (`facebook/kilt_tasks`), read as KILT's own lines.

A table has no absent fields, so that there -1, 0 and "" stand for what a JSON line leaves out:

    {"id": "q1", "input": "who", "meta": {"left_context": "", …}, "output": [{"answer": "x", "meta":
     {"score": 0}, "provenance": [{"wikipedia_id": "7", "title": "T", "section": "", "start_paragraph_id":
     1, "start_character": -1, …, "bleu_score": -1.0, "meta": {"annotation_id": "-1", …}}]}]}

becomes

    {"id": "q1", "input": "who", "output": [{"answer": "x", "provenance": [{"wikipedia_id": "7", "title":
     "T", "start_paragraph_id": 1}]}], "meta": {}}
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glimmer_jax.storage.json_lines import parse_line, read_json_lines
from glimmer_jax.storage.parquet import read_rows

ON_ERROR = ("raise", "skip")
ENTITY_START = "[START_ENT]"


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


def read_examples(
    path: str | Path, policy: Policy = Policy(), questions: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Examples of a task file, checked; lines are named `file:line` in every message.

    Args:
      path: JSON Lines, or Parquet as on the Hugging Face hub.
      policy: what becomes of lines at fault.
      questions: by id, for lines whose `input` is missing or empty.

    Raises ValueError for bad JSON, a missing or wrong field, an id given twice, or, when skipping,
    more than `policy.max_skipped` such lines.
    """
    seen: set[str] = set()
    skipped = 0
    for number, example, problem in _lines(path, policy):
        where = f"{path}:{number}"
        if problem is None:
            example = _named(example, questions or {})
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
    if policy.on_error == "raise" or Path(path).suffix == ".parquet":
        read = read_lines if Path(path).suffix == ".parquet" else read_json_lines
        for number, example in read(path):
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


def _named(example: dict[str, Any], questions: Mapping[str, str]) -> dict[str, Any]:
    """The example with its id as text (older data sets number theirs) and its question."""
    if type(example.get("id")) is int:
        example = {**example, "id": str(example["id"])}
    name = example.get("id")
    if not example.get("input") and isinstance(name, str) and name in questions:
        example = {**example, "input": questions[name]}
    return example


def check_example(example: dict[str, Any]) -> str | None:
    """What is wrong with an example, or None."""
    if not isinstance(example.get("id"), str) or not example["id"]:
        return f"wanted a string `id`, got {example.get('id')!r}"
    if example.get("input") in (None, ""):
        return (
            f"{example['id']!r} has no question in `input`. KILT's TriviaQA files hold ids alone: give "
            "TRIVIAQA, a pattern of TriviaQA's own files with all its splits"
        )
    if not isinstance(example["input"], str) or not example["input"].strip():
        return f"wanted a question in `input`, got {example['input']!r}"
    outputs = example.get("output", [])
    if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
        return "wanted a list of objects in `output`"
    for one in outputs:
        if not isinstance(one.get("answer", ""), str):
            return f"wanted a string `answer`, got {one['answer']!r}"
        provenance = one.get("provenance", [])
        if not isinstance(provenance, list) or not all(isinstance(p, dict) for p in provenance):
            return "wanted a list of objects in `provenance`"
        for place in provenance:
            for name in ("start_paragraph_id", "end_paragraph_id", "bleu_score"):
                if not isinstance(place.get(name), int | float | None):
                    return f"wanted a number or null in `{name}`, got {place[name]!r}"
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
    """Whether a passage answers: its page, and where both name them its paragraphs, in `where`.

    Passages name their page by its `wikipedia_id` in `page`, or by `title` alone, and their paragraph
    in `chunk`, or the first and the last one in `paragraphs`. What either side leaves out is not
    compared; null leaves out, and so does -1, KILT's mark of evidence not found in its page.
    """
    page = record.get("page", record.get("title"))
    paragraphs = record.get("paragraphs") or [record.get("chunk")]
    for one in where:
        # Ids are compared with ids: a title may look like another page's id.
        named = one.get("wikipedia_id") if "page" in record else one.get("title")
        if page is None or named is None or str(page) != str(named):
            continue
        first, last = (_paragraph(one, f"{end}_paragraph_id") for end in ("start", "end"))
        if first is None or paragraphs[0] is None:
            return True
        if first <= paragraphs[-1] and paragraphs[0] <= (first if last is None else last):
            return True
    return False


def _paragraph(provenance: Mapping[str, Any], name: str) -> int | None:
    number = provenance.get(name)
    return number if number is not None and number >= 0 else None


def shortened(question: str, words: int, dialogue: bool = False) -> str:
    """At most `words` words of a question, those around its marked mention or a dialogue's last ones.

        "… rose in [START_ENT] Avon [END_ENT] in …" -> "in [START_ENT] Avon [END_ENT] in"

    Other questions stay as they are: they begin with what they ask.
    """
    found = question.split()
    if len(found) <= words or not (dialogue or ENTITY_START in found):
        return question
    if dialogue:
        return " ".join(found[-words:])
    first = found.index(ENTITY_START)
    last = found.index("[END_ENT]", first) if "[END_ENT]" in found[first:] else first
    around = max(words - (last - first + 1), 0)
    # What one side does not need, the other one gets.
    left = min(first, max(around // 2, around - (len(found) - 1 - last)))
    return " ".join(found[first - left : last + 1 + around - left])


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
