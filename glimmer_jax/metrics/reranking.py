"""How often reranking puts a gold passage first, and whether that is more often than retrieval did."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def reranked_recall(
    targets: Sequence[Any], predictions: Sequence[Any], aux_values: Mapping[str, Any]
) -> dict[str, float]:
    """`recall_at_1` after reranking and `recall_kept`, over all questions.

    Aux values: `passage_scores` float `[B, K]` (ties keep the retriever's order), `kept_passages`
    int `[B, m]` (indices into the K), and `gold_passages` int `[B, K]`.
    """
    del targets, predictions
    gold = np.asarray(aux_values["gold_passages"]) > 0
    best = np.argmax(np.asarray(aux_values["passage_scores"]), axis=1)[:, None]
    kept = np.asarray(aux_values["kept_passages"])
    return {
        "recall_at_1": float(np.take_along_axis(gold, best, 1).mean()),
        "recall_kept": float(np.take_along_axis(gold, kept, 1).any(1).mean()),
    }


def warn_of_reranking(metrics: Mapping[str, float]) -> None:
    """Logs a warning for each task whose reranker puts a gold passage first less often than retrieval.

    Args:
      metrics: `{"task/metric": value}`, with `retriever_recall_at_1` beside `recall_at_1`.
    """
    for name, recall in metrics.items():
        task, _, metric = name.rpartition("/")
        retrieved = metrics.get(f"{task}/retriever_recall_at_1")
        if metric == "recall_at_1" and retrieved is not None and recall < retrieved:
            logger.warning(
                "%s: the reranker's recall at 1 is %.3f, below the retriever's %.3f on the same "
                "questions. Train longer, or with SUPERVISED_WEIGHT where gold passages are known; until "
                "then raise NUM_KEPT.",
                task, recall, retrieved,
            )  # fmt: skip
