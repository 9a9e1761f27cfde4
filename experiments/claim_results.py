"""The results file of `experiments.claims`: JSON Lines, appended to and never rewritten.

Three kinds of lines:

    {"questions": checksum, "pages": …, "baselines": …}   the test questions, once
    {"procedure": checksum, "about": …}                   what all arms share, once
    {"block", "arm", "seed", …, "results": …}             a unit

A unit names its questions and its procedure, so that results of different ones are never compared.
"""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt.examples import provenance, read_examples
from glimmer_jax.pydocs import baselines
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.storage.json_lines import dump_line, parse_line

BASELINE_DEPTH = 10  # passages that the rules read, as many as the models


class Results:
    """The lines of a results file.

    Attributes:
      units: records of units, in order.
      questions: checksum -> record of the questions.
      procedures: checksum -> record of the procedure.
    """

    def __init__(self, path: Path):
        """Reads the file, if there is one. A last line that was not completely written is dropped.

        Raises ValueError naming a line that is damaged.
        """
        self.path = path
        self.units: list[dict[str, Any]] = []
        self.questions: dict[str, dict[str, Any]] = {}
        self.procedures: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(self._complete().splitlines(), start=1):
            self._add(parse_line(line, f"{path}:{number}"))

    def _complete(self) -> bytes:
        """The file without a last line that was not completely written."""
        data = self.path.read_bytes() if self.path.is_file() else b""
        return data[: data.rfind(b"\n") + 1]

    def _add(self, record: dict[str, Any]) -> None:
        if "pages" in record:
            self.questions[record["questions"]] = record
        elif "about" in record:
            self.procedures[record["procedure"]] = record
        else:
            self.units.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line and waits until it is on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Read again: the file may have been replaced in the hours since, as git does.
        size = len(self._complete())
        with self.path.open("ab") as file:
            file.truncate(size)
            file.write(dump_line(record).encode())
            file.flush()
            os.fsync(file.fileno())
        self._add(record)

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The newest unit with these fields."""
        for record in reversed(self.units):
            if all(record.get(name) == value for name, value in fields.items()):
                return record
        return None

    def add_procedure(self, about: Mapping[str, Any]) -> str:
        """Records what all arms share, if it is new; returns its checksum."""
        checksum = digest(about)
        if checksum not in self.procedures:
            self.append({"procedure": checksum, "about": dict(about)})
        return checksum

    def add_questions(self, folder: Path, passages: Path, num_examples: int | None) -> str:
        """Records the test questions, if they are new; returns their checksum.

        Args:
          folder: of the retrieved files.
          passages: the passages folder.
          num_examples: of each task; None for all.
        """
        lines = {
            task: list(read_examples(folder / f"{task}-test.jsonl"))[:num_examples]
            for task in TASKS
        }
        checksum = digest(
            [[x["id"], x["input"], x["output"][0]["answer"]] for task in TASKS for x in lines[task]]
        )
        if checksum not in self.questions:
            pages = {
                task: [str(provenance(x)[0]["wikipedia_id"]) for x in lines[task]] for task in TASKS
            }
            names = {
                page: i for i, page in enumerate(sorted({x for xs in pages.values() for x in xs}))
            }
            texts = {record["id"]: record for record in Passages.open(passages).records()}
            rules = {}
            for task, examples in lines.items():
                read = [{**x, "retrieved": x["retrieved"][:BASELINE_DEPTH]} for x in examples]
                scores = baselines.scores(task, read, texts)
                rules[task] = {name: float(np.mean(values)) for name, values in scores.items()}
            record = {
                "questions": checksum,
                "pages": {
                    task: encode_numbers([names[page] for page in pages[task]]) for task in TASKS
                },
                "baselines": rules,
            }
            self.append(record)
        return checksum


def digest(value: Any) -> str:
    """A short checksum of settings or texts."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


NATS_UNIT = 1e-3  # of encoded nats


def encode_numbers(numbers: Sequence[int]) -> str:
    """Numbers below 65,536 as text; `decode_numbers` is the inverse."""
    return base64.b64encode(zlib.compress(np.asarray(numbers, "<u2").tobytes(), 9)).decode()


def decode_numbers(text: str) -> np.ndarray:
    """int64 `[n]`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").astype(np.int64)


def pack(bits: Sequence[Any]) -> str:
    """Truth values as text, eight per byte; `unpack` is the inverse."""
    return base64.b64encode(np.packbits(np.asarray(bits, bool)).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """bool `[count]`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)
