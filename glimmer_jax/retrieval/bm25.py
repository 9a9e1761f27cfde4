"""BM25 over a passages folder.

Title and text are indexed. `tune` prints recall for a grid of settings on dev questions; the defaults
are Lucene's.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt.files import read_files
from glimmer_jax.metrics.retrieval import format_report, mean_recall
from glimmer_jax.retrieval.retriever import Found, Retriever, retrieve
from glimmer_jax.runtime.preemption import STOP

_WORD = re.compile(r"[^\W_]+")
_NAME = re.compile(r"[^\W\d]\w*(?:\.\w+)+|\w*_\w+")


@dataclasses.dataclass(frozen=True)
class Bm25Config:
    """Settings of BM25 (Lucene's form).

    Attributes:
      k1: how soon further occurrences of a word stop to count.
      b: how much long passages are held back, from 0 to 1.
      title_weight: times the title is indexed.
      stem: language of a Snowball stemmer (needs PyStemmer), or None.
    """

    k1: float = 1.2
    b: float = 0.75
    title_weight: int = 1
    stem: str | None = None

    def __post_init__(self) -> None:
        if self.k1 <= 0:
            raise ValueError(f"k1 must be above 0, got {self.k1}.")
        if not 0 <= self.b <= 1:
            raise ValueError(f"b must be from 0 to 1, got {self.b}.")
        if self.title_weight < 0:
            raise ValueError(f"title_weight must be 0 or more, got {self.title_weight}.")

    def check_stemmer(self) -> None:
        """Raises ValueError where `stem` cannot be had, before passages are read."""
        if self.stem is not None:
            _stemmer(self.stem)


def words(text: str) -> list[str]:
    """Lower-case words; a qualified name is there whole as well as in parts."""
    lower = text.lower()
    return _WORD.findall(lower) + _NAME.findall(lower)


@functools.lru_cache(maxsize=4)
def _stemmer(language: str) -> Callable[[list[str]], list[str]]:
    try:
        import Stemmer
    except ImportError:
        raise ValueError(
            f"stem={language!r} needs PyStemmer. Install it (pip install PyStemmer) or set stem to "
            "None."
        ) from None
    if language not in Stemmer.algorithms():
        raise ValueError(f"stem is one of {', '.join(Stemmer.algorithms())}; got {language!r}.")
    found: Callable[[list[str]], list[str]] = Stemmer.Stemmer(language).stemWords
    return found


class Bm25:
    """An index of records `{"id", "title", "text", …}`."""

    def __init__(self, records: Iterable[dict[str, Any]], config: Bm25Config = Bm25Config()):
        self.records: list[dict[str, Any]] = []
        self.config = config
        corpus = []
        for record in STOP.polling(records):
            title, text = self._tokens(record["title"]), self._tokens(record["text"])
            self.records.append(record)
            corpus.append(title * config.title_weight + text)
        if not self.records:
            raise ValueError("No passage to index. Check the passages folder and its splits.")
        self._index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene", backend="numpy")
        self._index.index(corpus, show_progress=False)

    def _tokens(self, text: str) -> list[str]:
        found = words(text)
        return found if self.config.stem is None else _stemmer(self.config.stem)(found)

    def search(self, questions: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """(row of `records`, score) of at most `k` passages a question, best first.

        Passages that share no word with the question are left out. Of equal scores the earlier row
        comes first, so that results are the same everywhere.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}.")
        found: list[list[tuple[int, float]]] = []
        for question in questions:
            known = [w for w in self._tokens(question) if w in self._index.vocab_dict]
            if not known:
                found.append([])
                continue
            scores = self._index.get_scores(known)
            # A stable choice needs every passage that ties with the last one.
            edge = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
            rows = np.flatnonzero(scores >= max(edge, np.finfo(np.float32).tiny))
            best = rows[np.argsort(-scores[rows], kind="stable")[:k]]
            found.append([(int(row), float(scores[row])) for row in best])
        return found


class Bm25Retriever(Retriever):
    """BM25 over a passages folder, or over some of its rows; all of them are in RAM."""

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
        return Bm25((record for wanted, record in records if wanted), self._config)

    def among(self, rows: np.ndarray) -> "Bm25Retriever":
        return Bm25Retriever(self.passages, self._config, rows)

    def search(self, questions: Sequence[str], k: int) -> Found:
        found = []
        for question in questions:
            # Of a large corpus every question takes a while.
            STOP.poll_together()
            found += self._index.search([question], k)
        return [[(int(self._rows[row]), score) for row, score in one] for one in found]


def tune(
    passages_dir: str | Path,
    question_glob: str,
    k: int = 8,
    k1: Sequence[float] = (0.1, 0.2, 0.4, 0.9, 1.2),
    b: Sequence[float] = (0.2, 0.3, 0.4, 0.6, 0.75),
    title_weight: Sequence[int] = (1, 2),
    stem: Sequence[str | None] = (None,),
) -> Bm25Config:
    """Prints mean recall over the files for a grid of settings; returns the best at 1.

    Give dev files only: settings chosen on test questions would flatter the retriever.
    """
    files = read_files(question_glob)
    passages = Passages.open(passages_dir)
    rows: dict[str, dict[str, float]] = {}
    best: tuple[float, Bm25Config] | None = None
    for values in itertools.product(k1, b, title_weight, stem):
        config = Bm25Config(*values)
        retriever = Bm25Retriever(passages, config)
        made = [list(retrieve(retriever, examples, k)) for examples in files.values()]
        name = f"k1={config.k1} b={config.b} title={config.title_weight} stem={config.stem}"
        rows[name] = mean_recall(made, sorted({1, 5, k}))
        if best is None or rows[name]["recall_at_1"] > best[0]:
            best = rows[name]["recall_at_1"], config
    print(format_report(rows))
    assert best is not None
    return best[1]
