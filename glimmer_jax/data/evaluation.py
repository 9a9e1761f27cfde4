"""Runs seqio.Evaluator with plain functions over numpy batches."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio

from glimmer_jax.axes import check_lengths
from glimmer_jax.corpus.ids import is_hash
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.data.features import GlimmerFeatureConverter
from glimmer_jax.data.pipeline import attach, fill, find_mixture_or_task
from glimmer_jax.metrics import qa
from glimmer_jax.storage.folder import make_folder, of_file, read_file, write_file

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
# numpy batch -> int32 tokens [B, T], and per-row arrays {name: [B, ...]} (may be empty).
Predict = Callable[[Batch], tuple[Any, Mapping[str, Any]]]
# A stream of batches -> the same batches, fetched ahead.
Prefetch = Callable[[Iterable[Batch]], Iterable[Batch]]


class _Logger(seqio.JSONLogger):
    """seqio's logger; a resumed run that evaluates a step again replaces the step's line."""

    def __call__(self, task_name: str, step: int | None, *args: Any, **kwargs: Any) -> None:
        place = of_file(os.path.join(self.output_dir, f"{task_name}-metrics.jsonl"))
        lines = (read_file(*place) or b"").splitlines(keepends=True)
        kept = [line for line in lines if step is None or _is_earlier(line, step)]
        if kept != lines:
            write_file(*place, b"".join(kept))
        super().__call__(task_name, step, *args, **kwargs)


def _is_earlier(line: bytes, step: int) -> bool:
    """Whether a line is that of an earlier step; a cut or damaged one is not."""
    try:
        return bool(json.loads(line)["step"] < step)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


class Evaluation:
    """Dev or test examples of a mixture: read once, evaluated any number of times."""

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
          batch_size: rows of each batch of `predict` and `score`; the last batch is padded with
            empty rows.
          passages: the passages folder; None leaves `passage_ids` to the functions.
          num_examples: the first examples of each task; None for all.
          use_cached: read seqio's cache of the task.
          seed: of seqio's preprocessors.
          log_dir: gets predictions and metrics as JSON Lines; None writes nothing.

        Raises:
          ValueError: the name is unknown, no task has both metrics and this split, or a data file
            is invalid.
        """
        find_mixture_or_task(mixture_or_task_name)
        if log_dir is not None:
            # seqio's JSON logger does not create its folder.
            make_folder(log_dir)
        checked = check_lengths(lengths)
        self._passage_length = checked.passage
        self._batch_size = batch_size
        self._passages = passages
        self._evaluator = seqio.Evaluator(
            mixture_or_task_name,
            GlimmerFeatureConverter(),
            eval_split=split,
            use_cached=use_cached,
            seed=seed,
            sequence_length={
                **checked.as_features(),
                "passage_ids": checked.passages,
                "gold_passages": checked.passages,
            },
            num_examples=num_examples,
            logger_cls=[] if log_dir is None else [_Logger],
            log_dir=log_dir,
            # A second thread would run the devices while the training loop does.
            async_compute_metrics=False,
        )
        self._answered: dict[int, Any] = {}
        if not self._evaluator.eval_tasks:
            raise ValueError(
                f"No task of {mixture_or_task_name!r} has both metrics and a split {split!r}."
            )

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """The examples of each task as numpy features, in order."""
        cached = self._evaluator.cached_task_datasets
        return {name: list(ds.as_numpy_iterator()) for name, ds in cached.items()}

    def retriever(self, passages: Passages | None = None) -> dict[str, float]:
        """Metrics of the retriever on the same questions, as a baseline: `{"task/metric": value}`.

        `n`, the number of questions; `retriever_recall_at_1`, how often its first passage is gold; and
        `retriever_exact_match`, that of the first passage's title as the answer.

        Args:
          passages: the corpus; None leaves out exact match.
        """
        metrics: dict[str, float] = {}
        for task, examples in self.examples().items():
            metrics[f"{task}/n"] = len(examples)
            fields = examples[0].keys() if examples else ()
            if "gold_passages" in fields:
                gold = [(example["gold_passages"][:1] > 0).any() for example in examples]
                metrics[f"{task}/retriever_recall_at_1"] = float(np.mean(gold))
            if passages is not None and {"passage_ids", "answers"} <= set(fields):
                matches = [
                    any(
                        qa.match_of(_texts(example["answers"]), title)
                        for title in passages.titles(example["passage_ids"][:1])
                    )
                    for example in examples
                ]
                metrics[f"{task}/retriever_exact_match"] = float(np.mean(matches))
        return metrics

    def run(
        self,
        predict: Predict,
        step: int | None = None,
        prefetch: Prefetch = iter,
    ) -> dict[str, float]:
        """Returns the metrics, `{"task/metric": value}`.

        Args:
          predict: computes answers, and further arrays that metrics read (`passage_scores`, ...).
          step: for the logs.
          prefetch: applied to the batches of each task before `predict`.
        """

        answered = self._answered = {}

        def predict_with_aux(ds: Any) -> tuple[list[tuple[int, Any]], dict[str, list[Any]]]:
            # seqio calls once for metrics that read aux values and once for those that do not.
            if id(ds) not in answered:
                answered[id(ds)] = self._collect(ds, predict, prefetch)
            indices, outputs = answered[id(ds)]
            tokens, aux = zip(*outputs, strict=True)
            names = aux[0].keys()
            return (
                list(zip(indices, _same_length(tokens), strict=True)),
                {name: [values[name] for values in aux] for name in names},
            )

        def predict_only(ds: Any) -> list[tuple[int, Any]]:
            return predict_with_aux(ds)[0]

        metrics, _ = self._evaluator.evaluate(
            compute_metrics=True,
            step=step,
            predict_fn=predict_only,
            predict_with_aux_fn=predict_with_aux,
        )
        return {
            f"{task}/{name}": float(getattr(value, "value", value))
            for task, task_metrics in metrics.result().items()
            for name, value in task_metrics.items()
        }

    def predictions(self, passages: Passages | None = None) -> dict[str, list[dict[str, Any]]]:
        """Predictions of the last `run`: for each task, one record per example, in order.

        `{"id", "question", "answers", "prediction", "score", "passage_ids", "passage_titles",
        "passage_scores", "kept_passage_ids"}`, passages by score, best first; `answers` are the gold
        ones. Fields that the example or the function does not have are left out, and so are titles
        without `passages`. Then string ids cannot be restored, which is logged as a warning.
        """
        records = {}
        for task in self._evaluator.eval_tasks:
            ds = self._evaluator.cached_model_datasets[task.name]
            vocabulary = task.output_features["targets"].vocabulary
            examples = self._evaluator.cached_task_datasets[task.name].as_numpy_iterator()
            _, outputs = self._answered[id(ds)]
            records[task.name] = [
                _record(example, vocabulary.decode([int(token) for token in tokens]), aux, passages)
                for example, (tokens, aux) in zip(examples, outputs, strict=True)
            ]
        numbers = (
            number
            for rows in records.values()
            for record in rows
            for number in record.get("passage_ids", ())
        )
        if passages is None and any(is_hash(number) for number in numbers):
            logger.warning(
                "PASSAGES_DIR is not set: passages with string ids appear in the predictions as numbers. "
                "Set it, beside MEMORY_DIR, to the folder that the memory was built from."
            )
        return records

    def _collect(
        self, ds: Any, predict: Predict, prefetch: Prefetch
    ) -> tuple[list[int], list[tuple[np.ndarray, dict[str, np.ndarray]]]]:
        """(indices, rows of tokens and outputs), without padding rows."""
        indices: list[int] = []
        rows: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        counts: deque[int] = deque()

        def batches() -> Iterator[Batch]:
            for index, batch in ds.batch(self._batch_size).as_numpy_iterator():
                indices.extend(int(number) for number in index)
                counts.append(len(index))
                yield attach(fill(batch, self._batch_size), self._passages, self._passage_length)

        for batch in prefetch(batches()):
            tokens, aux = predict(batch)
            tokens = np.asarray(tokens)
            aux = {name: np.asarray(value) for name, value in aux.items()}
            for row in range(counts.popleft()):
                rows.append((tokens[row], {name: value[row] for name, value in aux.items()}))
        return indices, rows


def _record(
    example: Mapping[str, Any],
    prediction: str,
    aux: Mapping[str, np.ndarray],
    passages: Passages | None,
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": example["id"].decode("utf-8")}
    if "question" in example:
        record["question"] = example["question"].decode("utf-8")
    if "answers" in example:
        record["answers"] = _texts(example["answers"])
    record["prediction"] = prediction
    if "scores" in aux:
        record["score"] = float(aux["scores"])
    if "passage_scores" in aux:
        ids = example["passage_ids"][: len(aux["passage_scores"])]
        scores = aux["passage_scores"][: len(ids)]
        # Passages that the memory does not hold have score -inf and are left out.
        order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
        names = np.array(ids.tolist() if passages is None else passages.external_ids(ids), object)
        record["passage_ids"] = names[order].tolist()
        if passages is not None:
            record["passage_titles"] = passages.titles(ids[order])
        record["passage_scores"] = [round(float(score), 4) for score in scores[order]]
        kept = aux["kept_passages"]
        record["kept_passage_ids"] = names[kept[np.isin(kept, order)]].tolist()
    return record


def _texts(values: Any) -> list[str]:
    return [value.decode("utf-8") for value in values]


def _same_length(tokens: Any) -> list[np.ndarray]:
    # seqio stacks all predictions into one array, which NumPy 2 rejects for ragged rows.
    longest = max(len(row) for row in tokens)
    return [np.pad(row, (0, longest - len(row))) for row in tokens]
