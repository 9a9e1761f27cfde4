"""seqio.Evaluator driven by plain functions over numpy batches."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
from etils import epath

from glimmer_jax.data.features import GlimmerFeatureConverter, check_lengths
from glimmer_jax.data.pipeline import attach, fill, find_mixture_or_task
from glimmer_jax.passages import Passages

Batch = dict[str, Any]
# numpy batch -> int32 tokens [B, T], and per-row arrays {name: [B, ...]} (may be empty).
Predict = Callable[[Batch], tuple[Any, Mapping[str, Any]]]
Score = Callable[[Batch], Any]  # numpy batch -> float32 [B], log p(target)


class Evaluation:
    """Dev or test examples of a mixture, read once, evaluated as often as asked."""

    def __init__(
        self,
        mixture_or_task_name: str,
        split: str,
        lengths: Mapping[str, Any],
        batch_size: int,
        *,
        passages: Passages | None = None,
        num_examples: int | None = None,
        use_cached: bool = False,
        seed: int = 0,
        log_dir: str | None = None,
    ):
        """Reads and tokenises the examples.

        Args:
          mixture_or_task_name: registered with seqio; each task keeps its own metrics.
          split: validation or test.
          lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
          batch_size: rows of the batches that `predict` and `score` get; the last one is filled up.
          passages: where passages are read; None leaves `passage_ids` to the functions.
          num_examples: of each task, from its beginning; None for all.
          use_cached: read seqio's cache of the task.
          seed: of seqio's preprocessors.
          log_dir: gets predictions and metrics as JSON Lines; None writes nothing.

        Raises:
          ValueError: unknown name, no task with metrics and this split, or bad data files.
        """
        find_mixture_or_task(mixture_or_task_name)
        if log_dir is not None:
            # seqio's JSON logger expects its folder to be there.
            epath.Path(log_dir).mkdir(parents=True, exist_ok=True)
        question, target, num_passages, self._passage_length = check_lengths(lengths)
        self._batch_size = batch_size
        self._passages = passages
        self._evaluator = seqio.Evaluator(
            mixture_or_task_name,
            GlimmerFeatureConverter(),
            eval_split=split,
            use_cached=use_cached,
            seed=seed,
            sequence_length={
                "inputs": question,
                "targets": target,
                "passages": (num_passages, self._passage_length),
                "passage_ids": num_passages,
                "gold_passages": num_passages,
            },
            num_examples=num_examples,
            logger_cls=[] if log_dir is None else [seqio.JSONLogger],
            log_dir=log_dir,
            # A second thread would run the devices while the training loop does.
            async_compute_metrics=False,
        )
        if not self._evaluator.eval_tasks:
            raise ValueError(
                f"No task of {mixture_or_task_name!r} has both metrics and a split {split!r}."
            )

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """The examples of each task as numpy features, in order."""
        cached = self._evaluator.cached_task_datasets
        return {name: list(ds.as_numpy_iterator()) for name, ds in cached.items()}

    def run(
        self, predict: Predict, score: Score | None = None, step: int | None = None
    ) -> dict[str, float]:
        """Metrics `{"task/metric": value}`.

        Args:
          predict: answers, and what else metrics read (`passage_scores`, ...).
          score: needed only by tasks with score metrics.
          step: for the logs.
        """

        def predict_with_aux(ds: Any) -> tuple[list[tuple[int, Any]], dict[str, list[Any]]]:
            indices, outputs = self._collect(ds, predict)
            tokens, aux = zip(*outputs, strict=True)
            names = aux[0].keys()
            return (
                list(zip(indices, _same_length(tokens), strict=True)),
                {name: [one[name] for one in aux] for name in names},
            )

        def predict_only(ds: Any) -> list[tuple[int, Any]]:
            return predict_with_aux(ds)[0]

        def score_only(ds: Any) -> list[tuple[int, float]]:
            assert score is not None
            indices, outputs = self._collect(ds, lambda batch: (score(batch), {}))
            return [(i, float(one)) for i, (one, _) in zip(indices, outputs, strict=True)]

        metrics, _ = self._evaluator.evaluate(
            compute_metrics=True,
            step=step,
            predict_fn=predict_only,
            predict_with_aux_fn=predict_with_aux,
            score_fn=None if score is None else score_only,
        )
        return {
            f"{task}/{name}": float(getattr(value, "value", value))
            for task, found in metrics.result().items()
            for name, value in found.items()
        }

    def _collect(
        self, ds: Any, function: Callable[[Batch], tuple[Any, Mapping[str, Any]]]
    ) -> tuple[list[int], list[tuple[np.ndarray, dict[str, np.ndarray]]]]:
        """(indices, rows of what the function returns), without those of filled-up rows."""
        indices: list[int] = []
        rows: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        for index, batch in ds.batch(self._batch_size).as_numpy_iterator():
            filled = attach(fill(batch, self._batch_size), self._passages, self._passage_length)
            outputs, aux = function(filled)
            outputs = np.asarray(outputs)
            aux = {name: np.asarray(value) for name, value in aux.items()}
            for row, number in enumerate(index):
                indices.append(int(number))
                rows.append((outputs[row], {name: value[row] for name, value in aux.items()}))
        return indices, rows


def _same_length(tokens: Any) -> list[np.ndarray]:
    # seqio makes one array of all predictions, which NumPy 2 refuses for ragged ones.
    longest = max(len(one) for one in tokens)
    return [np.pad(one, (0, longest - len(one))) for one in tokens]
