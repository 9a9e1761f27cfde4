"""Both retrievers as one: a weighted sum of their scores, each brought to 0..1 for each question.

Why not reciprocal rank fusion: it throws the scores away, and Bruch, Gai and Ingber (arXiv
2210.11934) find a weighted sum better within and across domains, with one number to tune, for which
few questions are enough. That number is `weight`; `tune` prints recall for a grid of it on dev questions.

A retriever's best passage of a question counts 1 and its last of `DEPTH` counts 0, as do passages that
it did not find, so that nothing jumps at the end of a list.
"""

from collections.abc import Sequence

import numpy as np

from glimmer_jax.kilt.files import read_files
from glimmer_jax.metrics.retrieval import format_report, mean_recall
from glimmer_jax.retrieval.retriever import Found, Retriever, with_retrieved

# Passages of each retriever that are put together, if not more are asked for.
DEPTH = 100


class HybridRetriever(Retriever):
    """Passages of two retrievers over one folder."""

    def __init__(self, sparse: Retriever, dense: Retriever, weight: float):
        """Args:
          sparse, dense: of the same passages folder.
          weight: of `dense`, from 0 to 1; the rest is that of `sparse`.

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

    def search(self, questions: Sequence[str], k: int) -> Found:
        depth = max(k, DEPTH)
        sparse, dense = (one.search(questions, depth) for one in (self._sparse, self._dense))
        return [fuse(*both, self._weight, k) for both in zip(sparse, dense, strict=True)]


def check_weight(weight: float) -> None:
    """Raises ValueError where the weight of dense scores is out of range."""
    if not 0 <= weight <= 1:
        raise ValueError(f"The weight of dense scores (DENSE_WEIGHT) is from 0 to 1, got {weight}.")


def fuse(
    sparse: Sequence[tuple[int, float]],
    dense: Sequence[tuple[int, float]],
    weight: float,
    k: int,
) -> list[tuple[int, float]]:
    """The k best (row, score) of two lists of one question; of equal scores the earlier row first."""
    total: dict[int, float] = {}
    for found, share in ((sparse, 1 - weight), (dense, weight)):
        for row, score in zip((row for row, _ in found), _to_unit(found), strict=True):
            total[row] = total.get(row, 0.0) + share * score
    return sorted(total.items(), key=lambda one: (-one[1], one[0]))[:k]


def _to_unit(found: Sequence[tuple[int, float]]) -> list[float]:
    scores = [score for _, score in found]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    # Where all scores are equal, all are the best.
    return [(score - low) / (high - low) if high > low else 1.0 for score in scores]


def tune(
    sparse: Retriever,
    dense: Retriever,
    question_glob: str,
    k: int = 20,
    weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> float:
    """Prints mean recall over the files for each weight of `dense`; returns the best at 1.

    Give dev files only: a weight chosen on test questions would flatter the retriever. Each
    retriever is asked once, whatever the number of weights.
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
        made = [
            list(with_retrieved(sparse, examples, [fuse(*both, weight, k) for both in found]))
            for examples, found in lists
        ]
        rows[f"weight={weight:g}"] = row = mean_recall(made, sorted({1, 5, k}))
        if best is None or row["recall_at_1"] > best[0]:
            best = row["recall_at_1"], weight
    print(format_report(rows))
    assert best is not None
    return best[1]
