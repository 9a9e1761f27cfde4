"""Writes the example's corpus and questions: codes that every Python knows.

Passages describe operating system errors (`errno`), signals (`signal`), HTTP statuses (`http`) and
HTML entities (`html.entities`, `unicodedata`). Each passage has two or three questions, and a
passage's questions are all in one split. The committed files were written by Python 3.11 on Linux;
other versions differ in a few codes.

    python examples/own_data/make_data.py examples/own_data
"""

import errno
import hashlib
import html.entities
import http
import json
import os
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

KINDS = {
    "Lu": "a capital letter",
    "Ll": "a small letter",
    "Sc": "a currency sign",
    "Sm": "a mathematical sign",
    "Sk": "an accent",
    "So": "a symbol",
}
# Share of the passages: 70 % train, 10 % dev, 20 % test.
SPLITS = ("train",) * 7 + ("dev",) + ("test",) * 2

# Passage id, title, text, and its questions with their answers.
Entry = tuple[str, str, str, dict[str, str]]


def errors() -> Iterator[Entry]:
    """One passage per name in `errno`."""
    for number, name in sorted(errno.errorcode.items()):
        message = os.strerror(number)
        exception = type(OSError(number, message)).__name__
        text = (
            f"{name} is error number {number} of the operating system. Its message is: {message}. "
            f"Python raises {exception} for it."
        )
        questions = {
            f"which error means {message.lower()}": name,
            f"number of the error {name}": str(number),
            f"exception that Python raises for {name}": exception,
        }
        yield f"errno/{name}", name, text, questions


def signals() -> Iterator[Entry]:
    """One passage per signal that has a description."""
    for member in sorted(signal.Signals):
        meaning = signal.strsignal(member)
        if meaning is None or meaning.startswith("Real-time"):
            continue
        text = f"{member.name} is signal number {member.value} of a process. Its meaning is: {meaning}."
        questions = {
            f"which signal means {meaning.lower()}": member.name,
            f"number of the signal {member.name}": str(member.value),
        }
        yield f"signal/{member.name}", member.name, text, questions


def statuses() -> Iterator[Entry]:
    """One passage per HTTP status."""
    for status in http.HTTPStatus:
        text = f"{status.name} is HTTP status {status.value}, {status.phrase}."
        if status.description:
            text += f" The server says: {status.description}."
        questions = {
            f"HTTP status for {(status.description or status.phrase).lower()}": status.name,
            f"number of the HTTP status {status.name}": str(status.value),
        }
        yield f"http/{status.value}", status.name, text, questions


def entities() -> Iterator[Entry]:
    """One passage per named entity of HTML 4."""
    for entity, code in sorted(html.entities.name2codepoint.items(), key=lambda pair: pair[1]):
        character = chr(code)
        name = unicodedata.name(character, "").lower()
        kind = KINDS.get(unicodedata.category(character), "a punctuation mark")
        if not name:
            continue
        text = (
            f"The HTML entity &{entity}; stands for {character}, {kind}. "
            f"Unicode calls it {name}, code point U+{code:04X}, in decimal {code}."
        )
        questions = {
            f"HTML entity of {name}": f"&{entity};",
            f"Unicode code point of the entity &{entity};": f"U+{code:04X}",
        }
        yield f"entity/{entity}", f"&{entity};", text, questions


def split_of(passage: str) -> str:
    """The split of a passage's questions, from a hash of its id."""
    return SPLITS[hashlib.sha256(passage.encode()).digest()[0] % len(SPLITS)]


def write_lines(path: Path, records: Iterable[dict[str, object]]) -> None:
    """Writes JSON Lines."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def main(folder: Path) -> None:
    """Writes `corpus.jsonl` and `codes-<train|dev|test>.jsonl`."""
    entries = [*errors(), *signals(), *statuses(), *entities()]
    write_lines(
        folder / "corpus.jsonl",
        ({"id": passage, "title": title, "text": text} for passage, title, text, _ in entries),
    )
    questions: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    for passage, _, _, asked in entries:
        for number, (question, answer) in enumerate(asked.items(), start=1):
            output = [{"answer": answer, "provenance": [{"wikipedia_id": passage}]}]
            line = {"id": f"{passage}?{number}", "input": question, "output": output}
            questions[split_of(passage)].append(line)
    for split, lines in questions.items():
        write_lines(folder / f"codes-{split}.jsonl", lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
