"""Sparse and dense retrieval combined: a weighted sum of scores, each rescaled to 0..1 per question.

Reciprocal rank fusion discards the scores. Bruch, Gai and Ingber (arXiv 2210.11934) find a weighted sum
better within and across domains, with one weight that few questions suffice to tune; `tune` prints
recall for a grid of weights on dev questions.

A retriever's best passage for a question scores 1, and its last of `DEPTH` scores 0, as do passages that
it did not find, so that scores are continuous at the end of a list.
"""

from collections.abc import Sequence

import numpy as np

from glimmer_jax.kilt.files import read_files
from glimmer_jax.metrics.retrieval import format_report, mean_recall
from glimmer_jax.retrieval.retriever import Results, Retriever, with_retrieved

# Passages that each retriever contributes, unless more are requested.
DEPTH = 100


class HybridRetriever(Retriever):
    """Passages of two retrievers over one folder."""

    def __init__(self, sparse: Retriever, dense: Retriever, weight: float):
        """Combines two retrievers.

        Args:
          sparse, dense: over the same passages folder.
          weight: of dense scores, from 0 to 1; sparse scores have the rest.

        Raises:
          ValueError: the weight is out of range.
        """
        check_weight(weight)
        super().__init__(sparse.passages)
        self._sparse = sparse
        self._dense = dense
        self._weight = weight
        self.questions_at_a_time = max(sparse.questions_at_a_time, dense.questions_at_a_time)

    def among(self, rows: np.ndarray) -> "HybridRetriever":
        return HybridRetriever(self._sparse.among(rows), self._dense.among(rows), self._weight)

    def search(self, questions: Sequence[str], k: int) -> Results:
        depth = max(k, DEPTH)
        sparse = self._sparse.search(questions, depth)
        dense = self._dense.search(questions, depth)
        return [fuse(*both, self._weight, k) for both in zip(sparse, dense, strict=True)]


def check_weight(weight: float) -> None:
    """Raises ValueError where the weight of dense scores is out of range."""
    if not 0 <= weight <= 1:
        raise ValueError(f"DENSE_WEIGHT must be from 0 to 1, got {weight}.")


def fuse(
    sparse: Sequence[tuple[int, float]],
    dense: Sequence[tuple[int, float]],
    weight: float,
    k: int,
) -> list[tuple[int, float]]:
    """The k best (row, score) of two lists of one question; ties are in the order of rows."""
    total: dict[int, float] = {}
    for ranked, share in ((sparse, 1 - weight), (dense, weight)):
        for (row, _), score in zip(ranked, _to_unit(ranked), strict=True):
            total[row] = total.get(row, 0.0) + share * score
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:k]


def _to_unit(ranked: Sequence[tuple[int, float]]) -> list[float]:
    scores = [score for _, score in ranked]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    # Equal scores are all the best.
    return [(score - low) / (high - low) if high > low else 1.0 for score in scores]


def tune(
    sparse: Retriever,
    dense: Retriever,
    question_glob: str,
    k: int = 20,
    weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> float:
    """Prints mean recall over the files for each weight of dense scores; returns the best by recall at 1.

    Use dev files only: a weight chosen on test questions would overstate the retriever. Each retriever
    searches once, for all weights.
    """
    files = read_files(question_glob)
    depth = max(k, DEPTH)
    lists = []
    for examples in files.values():
        questions = [example["input"] for example in examples]
        both = (sparse.search(questions, depth), dense.search(questions, depth))
        lists.append((examples, list(zip(*both, strict=True))))
    rows: dict[str, dict[str, float]] = {}
    best: tuple[float, float] | None = None
    for weight in weights:
        retrieved = [
            list(with_retrieved(sparse, examples, [fuse(*both, weight, k) for both in ranked]))
            for examples, ranked in lists
        ]
        rows[f"weight={weight:g}"] = row = mean_recall(retrieved, sorted({1, 5, k}))
        if best is None or row["recall_at_1"] > best[0]:
            best = row["recall_at_1"], weight
    print(format_report(rows))
    assert best is not None
    return best[1]
