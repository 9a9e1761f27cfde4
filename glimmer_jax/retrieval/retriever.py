"""The interface of all retrievers, and `retrieved` for examples."""

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

# For each question, (row of the passages folder, score), best first.
Results = list[list[tuple[int, float]]]

# Records cached in RAM, because questions of one task share many passages.
_RECORDS = 65536


class Retriever(abc.ABC):
    """Searches the passages of one folder.

    Attributes:
      passages: the folder.
      record: row -> record, cached.
      questions_at_a_time: questions per call of `search` that use the machine well.
    """

    questions_at_a_time: int

    def __init__(self, passages: Passages):
        self.passages = passages
        self.record = functools.lru_cache(_RECORDS)(passages.record)

    @abc.abstractmethod
    def search(self, questions: Sequence[str], k: int) -> Results:
        """At most `k` passages per question; ties are in the order of rows."""

    @abc.abstractmethod
    def among(self, rows: np.ndarray) -> "Retriever":
        """The same retriever over these rows alone (int `[n]`, increasing)."""


def retrieve(
    retriever: Retriever, examples: Iterable[dict[str, Any]], k: int
) -> Iterator[dict[str, Any]]:
    """Copies of the examples with `retrieved`: `{"id", "score", "gold"}`, best first.

    At most `questions_at_a_time` examples are held.
    """
    examples = iter(examples)
    while batch := list(itertools.islice(examples, retriever.questions_at_a_time)):
        results = retriever.search([example["input"] for example in batch], k)
        yield from with_retrieved(retriever, batch, results)


def with_retrieved(
    retriever: Retriever, examples: Sequence[dict[str, Any]], results: Results
) -> Iterator[dict[str, Any]]:
    """Copies of the examples with `retrieved` from the results of a search."""
    for example, ranked in zip(examples, results, strict=True):
        places = provenance(example)
        retrieved = []
        for row, score in ranked:
            record = retriever.record(row)
            gold = is_gold(record, places)
            retrieved.append({"id": record["id"], "score": round(score, 4), "gold": gold})
        yield {**example, "retrieved": retrieved}


def rows_of_split(passages: Passages, split: str) -> np.ndarray:
    """Rows of the passages of a split; a passage without a split belongs to all.

    Raises ValueError where there is none.
    """
    records = STOP.polling(enumerate(passages.records()))
    rows = [row for row, record in records if record.get("split", split) == split]
    if not rows:
        raise ValueError(
            f"No passage of {passages.path} belongs to the split {split!r}, whose questions may see no "
            "other. Check the corpus's `split` fields, or the name of the question file."
        )
    return np.array(rows, np.int64)
