"""Gold and guess files of KILT (arXiv 2009.02252), checked, and paired by id.

Both are JSON Lines; gold lists all answers with their pages, a guess has one output, pages best first:

    {"id": "q1", "input": "who wrote emma", "output": [{"answer": "Jane Austen", "provenance":
     [{"wikipedia_id": "15782"}]}, {"answer": "Austen"}]}
    {"id": "q1", "output": [{"answer": "jane austen", "provenance": [{"wikipedia_id": "15782"}]}]}

Ids and pages may be strings or numbers, with `"7"` equal to 7. Unusual lines are read as by the official
scripts, and lines that those reject are rejected with file and line. Two differences: blank lines are
skipped, and a guess without `provenance` has no pages.
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
      answers: without space around them; empty ones left out.
      pages: distinct pages of each output, in order.
      evidence: distinct sets of pages that prove an answer, in order. Provenance that names no page
        counts as page "", and an empty list of provenance as an empty set, which cannot be found: in
        the official recall both stand in the denominator.
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
      answer: without space around it; None in a run of retrieval alone.
      pages: distinct, best first.
    """

    where: str
    answer: str | None
    pages: tuple[str, ...]


def read_pairs(gold_path: str | Path, guess_path: str | Path) -> list[tuple[Gold, Guess]]:
    """Each gold question with its guess, in the order of the gold file.

    Guesses for other questions are left out, as a file may hold those of a whole benchmark.

    Raises:
      ValueError: a malformed line, an id given twice, a gold file without questions, or gold
        questions without a guess.
    """
    gold, guesses = _by_id(gold_path), _by_id(guess_path)
    if not gold:
        raise ValueError(f"{gold_path} holds no question. Give a gold file of KILT's format.")
    missing = [name for name in gold if name not in guesses]
    if missing:
        raise ValueError(
            f"{guess_path} has no guess for {len(missing)} of {len(gold)} questions of {gold_path}, "
            f"the first is {missing[0]!r}. Write a line for each, with an empty answer if need be."
        )
    return [(parse_gold(*gold[name]), parse_guess(*guesses[name])) for name in gold]


def parse_gold(line: Line, where: str) -> Gold:
    """A line of a gold file. Raises ValueError, beginning with `where`."""
    outputs = _objects(line, "output", where)
    if not outputs:
        raise ValueError(
            f"{where}: wanted one or more objects in `output`, got []. Give a labelled gold file; "
            "KILT keeps the labels of its test files back."
        )
    answers: set[str] = set()
    pages: list[tuple[str, ...]] = []
    evidence: list[frozenset[str]] = []
    for output in outputs:
        answer = output.get("answer") or ""
        if not isinstance(answer, str):
            raise ValueError(
                f"{where}: wanted a string `answer`, got {answer!r}. Put it in quotation marks."
            )
        answers.add(answer.strip())
        if "provenance" not in output:
            continue
        provenance = _objects(output, "provenance", where)
        pages.append(_pages(provenance))
        found = frozenset(_page(one) if "wikipedia_id" in one else "" for one in provenance)
        if found not in evidence:
            evidence.append(found)
    return Gold(where, frozenset(answers - {""}), tuple(pages), tuple(evidence))


def parse_guess(line: Line, where: str) -> Guess:
    """A line of a guess file. Raises ValueError, beginning with `where`."""
    outputs = _objects(line, "output", where)
    if len(outputs) != 1:
        raise ValueError(
            f"{where}: wanted one object in `output`, got {len(outputs)}. A guess is one answer with "
            "all its pages."
        )
    output = outputs[0]
    if "answer" not in output and "provenance" not in output:
        raise ValueError(
            f"{where}: wanted `answer`, `provenance` or both in `output`, got {sorted(output)}. "
            'Write "answer": "" where there is no answer.'
        )
    # Numbers and null count as the text that Python prints for them.
    answer = str(output["answer"]).strip() if "answer" in output else None
    provenance = _objects(output, "provenance", where) if "provenance" in output else []
    return Guess(where, answer, _pages(provenance))


def _by_id(path: str | Path) -> dict[str, tuple[Line, str]]:
    """Line and `FILE:LINE` of each id, in order."""
    found: dict[str, tuple[Line, str]] = {}
    for number, line in read_json_lines(path):
        where = f"{path}:{number}"
        if type(line.get("id")) not in (str, int):
            raise ValueError(
                f"{where}: wanted a string or an integer `id`, got {line.get('id')!r}. Take the ids "
                "of KILT's files."
            )
        name = str(line["id"]).strip()
        if name in found:
            raise ValueError(
                f"{where}: the id {name!r} was given before, in {found[name][1]}. Keep one of them."
            )
        found[name] = line, where
    return found


def _objects(record: Line, key: str, where: str) -> list[Line]:
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(
            f"{where}: wanted a list of objects in `{key}`, got {str(value)[:80]}. See KILT's format."
        )
    return value


def _pages(provenance: list[Line]) -> tuple[str, ...]:
    pages = (_page(one) for one in provenance if "wikipedia_id" in one)
    return tuple(dict.fromkeys(pages))


def _page(one: Line) -> str:
    return str(one["wikipedia_id"]).strip()
