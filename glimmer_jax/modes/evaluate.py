"""Mode `eval`: metrics of a checkpoint on held-out questions, passages from tokens or a memory."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tensorstore as ts

from glimmer_jax.axes import Lengths
from glimmer_jax.metrics import qa
from glimmer_jax.metrics.reranking import warn_of_reranking
from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks, outputs
from glimmer_jax.modes.settings import Answering, AnsweringConfig, CorpusConfig, DatasetConfig
from glimmer_jax.runtime.prefetch import prefetch
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.serving.question_batch import check_something_to_read
from glimmer_jax.serving.step import add_candidates
from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import write_json_lines

if TYPE_CHECKING:
    from glimmer_jax.data.evaluation import Evaluation

Batch = dict[str, Any]


def evaluate(
    reader: AnsweringConfig,
    dataset: DatasetConfig,
    corpus: CorpusConfig,
    num_examples: int | None = None,
    output_dir: str | None = None,
    overwrite: bool = False,
    operative_config: Callable[[], str] = str,
) -> dict[str, float]:
    """Prints and returns `{"task/metric": value}`.

    Args:
      reader: the model and its checkpoint.
      dataset: the questions.
      corpus: where passages are read.
      num_examples: of each task; None for all.
      output_dir: local or in a bucket; gets `metrics.json`, `config.gin` and
        `predictions-<task>.jsonl`.
      overwrite: replace an evaluation of other settings in `output_dir`.
      operative_config: returns the text of the operative configuration.

    Raises:
      ValueError: settings, files or lengths that do not fit together, or `output_dir` holds another
        evaluation.
    """
    # Settings, without reading anything.
    checks.required(
        CHECKPOINT_PATH=reader.checkpoint_path, MIXTURE_OR_TASK_NAME=dataset.mixture_or_task_name
    )
    check_something_to_read(corpus.passages_dir, corpus.memory_dir)
    answering = reader.prepare(corpus, dataset.task_feature_lengths, dataset.batch_size)
    lengths, vocabulary = answering.lengths, answering.vocabulary
    dataset = dataclasses.replace(dataset, task_feature_lengths=lengths.as_features())
    config_text = operative_config()
    with outputs.locked(output_dir, in_place=True) as check_lock:
        if output_dir is not None:
            if not overwrite:
                _check_free(output_dir, config_text)
            if jax.process_index() == 0:
                # A folder that cannot be written must not be discovered after the evaluation.
                folder.make_folder(output_dir)
        dataset.register(vocabulary)
        passages = checks.open_passages(corpus.passages_dir, dataset.data_dir, vocabulary)
        dataset.check_fit(vocabulary, has_passages=True, num_examples=num_examples)
        predictor = reader.load(answering, corpus, (dataset.batch_size,), passages=passages)
        encoded_now = None if predictor.from_memory else predictor.passages
        evaluation = dataset.evaluation(encoded_now, num_examples)
        metrics = _measure(evaluation, predictor, answering, corpus)
        for name, value in sorted(metrics.items()):
            print(f"{name:48} {value:.4f}")
        warn_of_reranking(metrics)
        if output_dir is not None and jax.process_index() == 0:
            predictions = evaluation.predictions(predictor.passages)
            check_lock()
            _write(output_dir, predictions, metrics, config_text)
    return metrics


def _check_free(output_dir: str, config_text: str) -> None:
    """Raises ValueError where the folder holds an evaluation of other settings."""
    if changed := outputs.changed_settings(output_dir, config_text):
        raise ValueError(
            f"EVAL_OUTPUT_DIR: {output_dir} holds an evaluation of other settings ({changed[0]}; "
            f"{len(changed)} in all). Set OVERWRITE=True to replace it, or write to another folder."
        )


def _measure(
    evaluation: "Evaluation", predictor: Predictor, answering: Answering, corpus: CorpusConfig
) -> dict[str, float]:
    """Answers all questions; metrics of the answers, the retriever and the work."""
    throughput = _Throughput(predictor, answering.candidates)
    metrics = qa.with_mean(evaluation.run(throughput.predict, prefetch=throughput.prefetch))
    metrics |= evaluation.retriever(predictor.passages)
    metrics["tflop_per_question"] = _tflop_per_question(answering.model, answering.lengths)
    if throughput.answered:
        metrics["questions_per_second"] = throughput.rate
    if corpus.memory_dir is not None:
        metrics["seconds_waiting_for_memory"] = predictor.waited
    if corpus.unknown_passages == "mask":
        metrics["passages_not_in_memory"] = predictor.masked
    return metrics


def _write(
    output_dir: str,
    predictions: Mapping[str, list[dict[str, Any]]],
    metrics: Mapping[str, float],
    config_text: str,
) -> None:
    """Writes `predictions-<task>.jsonl`, `config.gin` and, last, `metrics.json`.

    An evaluation that is replaced is removed first: its metrics, and answers to other tasks, must not
    lie beside new ones.
    """
    output = folder.open_folder(output_dir)
    for task in _evaluated_tasks(output):
        folder.remove_file(output, f"predictions-{task}.jsonl")
    folder.remove_file(output, "metrics.json")
    for task, rows in predictions.items():
        write_json_lines(os.path.join(output_dir, f"predictions-{task}.jsonl"), rows)
    folder.write_file(output, "config.gin", config_text.encode())
    folder.write_file(output, "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())


def _evaluated_tasks(output: ts.KvStore) -> set[str]:
    """The tasks of the evaluation in a folder; none if there is none, or its metrics are damaged."""
    try:
        names = json.loads(folder.read_file(output, "metrics.json") or b"{}")
    except (ValueError, RecursionError):
        return set()
    return {name.partition("/")[0] for name in names if "/" in name}


class _Throughput:
    """Answers batches and measures questions per second, without the first batch, which compiles."""

    def __init__(self, predictor: Predictor, candidates_NT: np.ndarray | None):
        self.answered = 0
        self._predictor = predictor
        self._candidates_NT = candidates_NT
        self._busy = 0.0  # seconds of computing and of waiting for batches
        self._progress: Progress | None = None  # from the first batch on

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each built and its memory read while the one before is computed."""
        with contextlib.closing(prefetch(batches, lambda batch: batch)) as built:
            ready = self._predictor.prefetch(built)
            while True:
                began = time.monotonic()
                batch = next(ready, None)
                if self._progress is not None:
                    self._busy += time.monotonic() - began
                if batch is None:
                    return
                yield batch

    def predict(self, batch: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `Predictor.predict`."""
        began = time.monotonic()
        outputs = self._predictor.predict(add_candidates(batch, self._candidates_NT))
        if self._progress is None:
            self._progress = Progress("eval", None, "questions", emit=_print)
            return outputs
        self._busy += time.monotonic() - began
        # Rows that pad the last batch have no question.
        questions = int((batch["question_tokens"] > 0).any(axis=1).sum())
        self.answered += questions
        self._progress.advance(questions)
        return outputs

    @property
    def rate(self) -> float:
        """Questions per second, without computing metrics."""
        return self.answered / self._busy


def _print(line: str) -> None:
    print(line, flush=True)


def _tflop_per_question(model: GlimmerModel, lengths: Lengths) -> float:
    cost = question_cost(
        model.config,
        passages=lengths.passages,
        question=lengths.question,
        passage=lengths.passage,
        answer=lengths.target,
    )
    return cost.tflop
