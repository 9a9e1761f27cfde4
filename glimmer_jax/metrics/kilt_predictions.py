"""Reads gold and guess files of KILT (arXiv 2009.02252), checks them and pairs them by id.

Both are JSON Lines. A gold line lists all answers with their pages; a guess has one output, with
pages best first:

    {"id": "q1", "input": "who wrote emma", "output": [{"answer": "Jane Austen", "provenance":
     [{"wikipedia_id": "15782"}]}, {"answer": "Austen"}]}
    {"id": "q1", "output": [{"answer": "jane austen", "provenance": [{"wikipedia_id": "15782"}]}]}

Ids and pages may be strings or numbers; `"7"` equals 7. Lines are interpreted as in the official
scripts, and lines that those scripts reject are rejected with file and line. There are two
differences: blank lines are skipped, and a guess without `provenance` has no pages.
"""

import dataclasses
from pathlib import Path
from typing import Any

from glimmer_jax.storage.json_lines import read_json_lines

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Gold:
    """The gold answers and pages of a question.

    Attributes:
      where: `FILE:LINE`, for messages.
      answers: stripped, without empty ones.
      pages: distinct pages of each output, in order.
      evidence: distinct sets of pages that support an answer, in order. Provenance without a page
        counts as page "", and an empty provenance list as an empty set, which no guess can match:
        both are in the denominator of the official recall.
    """

    where: str
    answers: frozenset[str]
    pages: tuple[tuple[str, ...], ...]
    evidence: tuple[frozenset[str], ...]


@dataclasses.dataclass(frozen=True)
class Guess:
    """A system's answer and pages for a question.

    Attributes:
      where: `FILE:LINE`, for messages.
      answer: stripped; None in retrieval-only files.
      pages: distinct pages, best first.
    """

    where: str
    answer: str | None
    pages: tuple[str, ...]


def read_pairs(gold_path: str | Path, guess_path: str | Path) -> list[tuple[Gold, Guess]]:
    """Pairs each gold question with its guess, in the order of the gold file.

    Guesses for other questions are ignored, since a file may cover the entire benchmark.

    Raises:
      ValueError: a line is malformed, an id is repeated, the gold file has no questions, or a gold
        question has no guess.
    """
    gold, guesses = _by_id(gold_path), _by_id(guess_path)
    if not gold:
        raise ValueError(f"{gold_path} has no questions. Use a gold file in KILT's format.")
    missing = [name for name in gold if name not in guesses]
    if missing:
        raise ValueError(
            f"{guess_path} has no guess for {len(missing)} of {len(gold)} questions of {gold_path}, "
            f"the first is {missing[0]!r}. Write one line per question, with an empty answer if needed."
        )
    return [(parse_gold(*gold[name]), parse_guess(*guesses[name])) for name in gold]


def parse_gold(line: Line, where: str) -> Gold:
    """Parses a line of a gold file. Raises ValueError for a malformed line, starting with `where`."""
    outputs = _objects(line, "output", where)
    if not outputs:
        raise ValueError(
            f"{where}: expected one or more objects in `output`, got []. Use a labelled gold file; "
            "KILT does not publish the labels of its test files."
        )
    answers: set[str] = set()
    pages: list[tuple[str, ...]] = []
    evidence: list[frozenset[str]] = []
    for output in outputs:
        answer = output.get("answer") or ""
        if not isinstance(answer, str):
            raise ValueError(
                f"{where}: expected a string `answer`, got {answer!r}. Put it in quotation marks."
            )
        answers.add(answer.strip())
        if "provenance" not in output:
            continue
        provenance = _objects(output, "provenance", where)
        pages.append(_pages(provenance))
        page_set = frozenset(_page(x) if "wikipedia_id" in x else "" for x in provenance)
        if page_set not in evidence:
            evidence.append(page_set)
    return Gold(where, frozenset(answers - {""}), tuple(pages), tuple(evidence))


def parse_guess(line: Line, where: str) -> Guess:
    """Parses a line of a guess file. Raises ValueError for a malformed line, starting with `where`."""
    outputs = _objects(line, "output", where)
    if len(outputs) != 1:
        raise ValueError(
            f"{where}: expected one object in `output`, got {len(outputs)}. Write one answer with all "
            "its pages."
        )
    output = outputs[0]
    if "answer" not in output and "provenance" not in output:
        raise ValueError(
            f"{where}: expected `answer`, `provenance` or both in `output`, got {sorted(output)}. "
            'Write "answer": "" for an empty answer.'
        )
    # Numbers and null are converted with `str`, as in the official scripts.
    answer = str(output["answer"]).strip() if "answer" in output else None
    provenance = _objects(output, "provenance", where) if "provenance" in output else []
    return Guess(where, answer, _pages(provenance))


def _by_id(path: str | Path) -> dict[str, tuple[Line, str]]:
    """(line, `FILE:LINE`) of each id, in order."""
    by_id: dict[str, tuple[Line, str]] = {}
    for number, line in read_json_lines(path):
        where = f"{path}:{number}"
        if type(line.get("id")) not in (str, int):
            raise ValueError(
                f"{where}: expected a string or an integer `id`, got {line.get('id')!r}. Use the ids of "
                "KILT's files."
            )
        name = str(line["id"]).strip()
        if name in by_id:
            raise ValueError(
                f"{where}: the id {name!r} is already in {by_id[name][1]}. Keep one of these lines."
            )
        by_id[name] = line, where
    return by_id


def _objects(record: Line, key: str, where: str) -> list[Line]:
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(
            f"{where}: expected a list of objects in `{key}`, got {str(value)[:80]}. Use KILT's format."
        )
    return value


def _pages(provenance: list[Line]) -> tuple[str, ...]:
    pages = (_page(entry) for entry in provenance if "wikipedia_id" in entry)
    return tuple(dict.fromkeys(pages))


def _page(entry: Line) -> str:
    return str(entry["wikipedia_id"]).strip()
