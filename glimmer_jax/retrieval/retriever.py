"""What every retriever does, and how examples get their passages from one."""

import abc
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt.examples import provenance
from glimmer_jax.kilt.gold import is_gold
from glimmer_jax.runtime.preemption import STOP

# For each question (row of the passages folder, score), best first.
Found = list[list[tuple[int, float]]]

# Records kept in RAM: questions of one task ask for the same passages again and again.
_RECORDS = 65536


class Retriever(abc.ABC):
    """Finds passages of one folder.

    Attributes:
      passages: the folder.
      record: the record of a row.
      questions_at_a_time: of one call that does not waste time.
    """

    questions_at_a_time: int

    def __init__(self, passages: Passages):
        self.passages = passages
        self.record = functools.lru_cache(_RECORDS)(passages.text)

    @abc.abstractmethod
    def search(self, questions: Sequence[str], k: int) -> Found:
        """At most `k` passages a question; of equal scores the earlier row comes first."""

    @abc.abstractmethod
    def among(self, rows: np.ndarray) -> "Retriever":
        """The same retriever, which finds only these rows (int `[n]`, increasing)."""


def retrieve(
    retriever: Retriever, examples: Iterable[dict[str, Any]], k: int
) -> Iterator[dict[str, Any]]:
    """Copies of the examples with `retrieved`: `{"id", "score", "gold"}`, best first.

    No more examples are held than the retriever is asked at a time.
    """
    examples = iter(examples)
    while some := list(itertools.islice(examples, retriever.questions_at_a_time)):
        found = retriever.search([example["input"] for example in some], k)
        yield from with_retrieved(retriever, some, found)


def with_retrieved(
    retriever: Retriever, examples: Sequence[dict[str, Any]], found: Found
) -> Iterator[dict[str, Any]]:
    """Copies of the examples with what was found for them."""
    for example, result in zip(examples, found, strict=True):
        where = provenance(example)
        retrieved = []
        for row, score in result:
            record = retriever.record(row)
            gold = is_gold(record, where)
            retrieved.append({"id": record["id"], "score": round(score, 4), "gold": gold})
        yield {**example, "retrieved": retrieved}


def rows_of_split(passages: Passages, split: str) -> np.ndarray:
    """Rows of the passages of a split; one that names no split belongs to each.

    Raises ValueError where there is none.
    """
    records = STOP.polling(enumerate(passages.records()))
    rows = [row for row, one in records if one.get("split", split) == split]
    if not rows:
        raise ValueError(
            f"No passage of {passages.path} belongs to the split {split!r}, and questions of that split "
            "may see no other. Check the corpus's `split` fields, or the name of the question file."
        )
    return np.array(rows, np.int64)
