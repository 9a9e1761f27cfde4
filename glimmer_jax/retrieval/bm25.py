"""BM25 over titles and texts of a passages folder.

The defaults are Lucene's; `tune` prints recall for a grid of settings on dev questions.
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt.files import read_files
from glimmer_jax.metrics.retrieval import format_report, mean_recall
from glimmer_jax.retrieval.retriever import Results, Retriever, retrieve
from glimmer_jax.retrieval.words import words
from glimmer_jax.runtime.preemption import STOP

logger = logging.getLogger(__name__)
# The library sets its own level to DEBUG.
logging.getLogger("bm25s").setLevel(logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Bm25Config:
    """Settings of BM25 (Lucene's form).

    Attributes:
      k1: saturation; with a smaller value, repeated occurrences of a word count less.
      b: length normalisation, from 0 (none) to 1.
      title_weight: how many times the title is indexed.
      stem: language of a Snowball stemmer, such as "english" (needs PyStemmer); None does not stem.
    """

    k1: float = 1.2
    b: float = 0.75
    title_weight: int = 1
    stem: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.k1 < math.inf:
            raise ValueError(f"BM25_K1: k1 must be above 0 and finite, got {self.k1}.")
        if not 0 <= self.b <= 1:
            raise ValueError(f"BM25_B: b must be from 0 to 1, got {self.b}.")
        if self.title_weight < 0:
            raise ValueError(
                f"BM25_TITLE_WEIGHT: title_weight must be at least 0, got {self.title_weight}."
            )

    def check_stemmer(self) -> None:
        """Raises ValueError where the stemmer is missing or the language unknown."""
        if self.stem is not None:
            _stemmer(self.stem)


@functools.lru_cache(maxsize=4)
def _stemmer(language: str) -> Callable[[list[str]], list[str]]:
    try:
        import Stemmer
    except ImportError:
        raise ValueError(
            f"BM25_STEM: {language!r} needs PyStemmer. Install it (pip install PyStemmer), or set "
            "BM25_STEM to None."
        ) from None
    if language not in Stemmer.algorithms():
        raise ValueError(
            f"BM25_STEM must be one of {', '.join(Stemmer.algorithms())}, got {language!r}."
        )
    stem: Callable[[list[str]], list[str]] = Stemmer.Stemmer(language).stemWords
    return stem


class Bm25:
    """An index of records `{"id", "title", "text", …}`."""

    def __init__(self, records: Iterable[dict[str, Any]], config: Bm25Config = Bm25Config()):
        self.config = config
        corpus = []
        for record in STOP.polling(records):
            title, text = self._tokens(record["title"]), self._tokens(record["text"])
            corpus.append(title * config.title_weight + text)
        if not corpus:
            raise ValueError("No passage to index. Check the passages folder and its splits.")
        self._index: bm25s.BM25 | None = None
        if not any(corpus):
            logger.warning(
                "None of %d passages has a word to index; BM25 finds nothing.", len(corpus)
            )
            return
        self._index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene", backend="numpy")
        self._index.index(corpus, show_progress=False)

    def _tokens(self, text: str) -> list[str]:
        tokens = words(text)
        return tokens if self.config.stem is None else _stemmer(self.config.stem)(tokens)

    def search(self, questions: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """(number of the record, score) of at most `k` passages per question, best first.

        Passages that share no word with the question are left out. Ties are in the order of rows, so that
        results do not depend on the machine.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        return [self._search(question, k) for question in questions]

    def _search(self, question: str, k: int) -> list[tuple[int, float]]:
        known = [
            word
            for word in self._tokens(question)
            if self._index is not None and word in self._index.vocab_dict
        ]
        if not known:
            return []
        assert self._index is not None
        scores = self._index.get_scores(known)
        # A stable choice needs every passage that ties with the last one.
        lowest = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        rows = np.flatnonzero(scores >= max(lowest, np.finfo(np.float32).tiny))
        best = rows[np.argsort(-scores[rows], kind="stable")[:k]]
        return [(int(row), float(scores[row])) for row in best]


class Bm25Retriever(Retriever):
    """BM25 over a passages folder or some of its rows, with the index in RAM."""

    questions_at_a_time = 512

    def __init__(
        self, passages: Passages, config: Bm25Config = Bm25Config(), rows: np.ndarray | None = None
    ):
        super().__init__(passages)
        self._config = config
        self._rows = np.arange(len(passages)) if rows is None else rows

    @functools.cached_property
    def _index(self) -> Bm25:
        chosen = np.zeros(len(self.passages), bool)
        chosen[self._rows] = True
        records = zip(chosen, self.passages.records(), strict=True)
        return Bm25((record for is_chosen, record in records if is_chosen), self._config)

    def among(self, rows: np.ndarray) -> "Bm25Retriever":
        return Bm25Retriever(self.passages, self._config, rows)

    def search(self, questions: Sequence[str], k: int) -> Results:
        results = []
        for question in questions:
            # In a large corpus a single question takes long.
            STOP.poll_together()
            results += self._index.search([question], k)
        return [[(int(self._rows[row]), score) for row, score in ranked] for ranked in results]


def tune(
    passages_dir: str | Path,
    question_glob: str,
    k: int = 8,
    k1: Sequence[float] = (0.1, 0.2, 0.4, 0.9, 1.2),
    b: Sequence[float] = (0.2, 0.3, 0.4, 0.6, 0.75),
    title_weight: Sequence[int] = (1, 2),
    stem: Sequence[str | None] = (None,),
) -> Bm25Config:
    """Prints mean recall over the files for a grid of settings; returns the best by recall at 1.

    Use dev files only: settings chosen on test questions would overstate the retriever.
    """
    files = read_files(question_glob)
    passages = Passages.open(passages_dir)
    rows: dict[str, dict[str, float]] = {}
    best: tuple[float, Bm25Config] | None = None
    for values in itertools.product(k1, b, title_weight, stem):
        config = Bm25Config(*values)
        retriever = Bm25Retriever(passages, config)
        retrieved = [list(retrieve(retriever, examples, k)) for examples in files.values()]
        name = f"k1={config.k1} b={config.b} title={config.title_weight} stem={config.stem}"
        rows[name] = mean_recall(retrieved, sorted({1, 5, k}))
        if best is None or rows[name]["recall_at_1"] > best[0]:
            best = rows[name]["recall_at_1"], config
    print(format_report(rows))
    assert best is not None
    return best[1]
