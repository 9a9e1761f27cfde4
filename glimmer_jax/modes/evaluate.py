"""Mode `eval`: a checkpoint on held-out questions, passages from tokens or from a memory."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval import corpus_check
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.serving.step import add_candidates, encode_candidates
from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import write_json_lines
from glimmer_jax.vocabulary import Vocabulary


def evaluate(
    model: GlimmerModel,
    checkpoint_path: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, Any],
    batch_size: int,
    passages_dir: str | None = None,
    memory_dir: str | None = None,
    mixture_or_task_module: str | None = None,
    data_dir: str | None = None,
    output_dir: str | None = None,
    split: str = "test",
    num_examples: int | None = None,
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
    memory_bytes_per_device: int = 0,
    unknown_passages: Literal["error", "mask"] = "error",
    use_cached_tasks: bool = False,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
    operative_config: Callable[[], str] = str,
) -> dict[str, float]:
    """Prints, and returns, `{"task/metric": value}`.

    Args:
      model: FiD, LUMEN or GLIMMER.
      checkpoint_path: a run's folder, a step's, or a `.safetensors` file, of any cut.
      mixture_or_task_name: registered with seqio.
      task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      batch_size: questions at a time over all devices.
      passages_dir: encode passages from here; or
      memory_dir: read their memory from here.
      mixture_or_task_module: imported first; registers the tasks.
      data_dir: folder of retrieved files for tasks that read them.
      output_dir: local or a bucket; gets `metrics.json`, `config.gin` and `predictions-<task>.jsonl`.
      split: validation or test.
      num_examples: of each task; None for all.
      mesh: devices.
      vocabulary: of tasks and passages.
      memory_bytes_per_device: a memory that fits into this is kept on the devices.
      unknown_passages: ids that the memory lacks are an `error`, or with `mask` absent, and counted.
      use_cached_tasks: read seqio's caches.
      candidates: the only answers allowed, for the questions of all tasks; None lets the model write
        its own.
      seed: of drawn answers.
      operative_config: text of the configuration in force.

    Raises:
      ValueError: settings, files or lengths that do not fit together.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path, MIXTURE_OR_TASK_NAME=mixture_or_task_name)
    lengths = checks.lengths_for(model.config, task_feature_lengths)
    checks.vocabulary_fits(model, vocabulary)
    devices = make_mesh(mesh)
    checks.batch_size("BATCH_SIZE", batch_size, devices)
    checks.passages_divide(lengths, devices)
    if output_dir is not None and jax.process_index() == 0:
        # Fails now rather than after the evaluation.
        folder.make_folder(output_dir)
    candidates_NT = None
    if candidates is not None:
        candidates_NT = encode_candidates(candidates, vocabulary, lengths.target)
    if passages_dir is not None and data_dir is not None:
        corpus_check.check(data_dir, Passages.open(passages_dir, vocabulary.fingerprint))
    predictor = Predictor.load(
        checkpoint_path,
        lengths,
        model=model,
        passages_dir=passages_dir,
        memory_dir=memory_dir,
        vocabulary=vocabulary,
        mesh=mesh,
        memory_bytes_per_device=memory_bytes_per_device,
        unknown_passages=unknown_passages,
        batch_sizes=(batch_size,),
        seed=seed,
    )

    from glimmer_jax.data import pipeline, retrieved_tasks
    from glimmer_jax.data.evaluation import Evaluation
    from glimmer_jax.metrics import qa

    retrieved_tasks.configure(data_dir, vocabulary=vocabulary)
    pipeline.import_tasks(mixture_or_task_module)
    counts = pipeline.check_fit(
        mixture_or_task_name,
        split,
        task_feature_lengths,
        vocabulary=vocabulary,
        has_passages=True,
        use_cached=use_cached_tasks,
        examples=num_examples,
    )
    print("Examples: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    dev = Evaluation(
        mixture_or_task_name,
        split,
        task_feature_lengths,
        batch_size,
        passages=None if predictor.from_memory else predictor.passages,
        num_examples=num_examples,
        use_cached=use_cached_tasks,
    )
    throughput = _Throughput(predictor, candidates_NT)

    metrics = qa.with_mean(dev.run(throughput.predict, prefetch=predictor.prefetch))
    cost = question_cost(
        model.config,
        passages=lengths.passages,
        question=lengths.question,
        passage=lengths.passage,
        answer=lengths.target,
    )
    metrics["tflop_per_question"] = cost.tflop
    if throughput.answered:
        metrics["questions_per_second"] = throughput.rate
    if memory_dir is not None:
        metrics["seconds_waiting_for_memory"] = predictor.waited
    if unknown_passages == "mask":
        metrics["passages_not_in_memory"] = predictor.masked
    for name, value in sorted(metrics.items()):
        print(f"{name:48} {value:.4f}")
    if output_dir is not None and jax.process_index() == 0:
        for task, rows in dev.predictions().items():
            write_json_lines(os.path.join(output_dir, f"predictions-{task}.jsonl"), rows)
        output = folder.open_folder(output_dir)
        folder.write_file(output, "config.gin", operative_config().encode())
        folder.write_file(output, "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


class _Throughput:
    """Answers batches and measures questions per second, without the first batch, which compiles."""

    def __init__(self, predictor: Predictor, candidates_NT: np.ndarray | None):
        self.answered = 0
        self._predictor = predictor
        self._candidates_NT = candidates_NT
        self._busy = 0.0
        self._progress: Progress | None = None

    def predict(self, batch: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `Predictor.predict`."""
        began = time.monotonic()
        outputs = self._predictor.predict(add_candidates(batch, self._candidates_NT))
        if self._progress is None:
            self._progress = Progress("eval", None, "questions", emit=_print)
            return outputs
        self._busy += time.monotonic() - began
        # The last batch is filled up with rows without a question.
        questions = int((batch["question_tokens"] > 0).any(axis=1).sum())
        self.answered += questions
        self._progress.advance(questions)
        return outputs

    @property
    def rate(self) -> float:
        """Questions per second of computing and of waiting for memory."""
        return self.answered / (self._busy + self._predictor.waited)


def _print(line: str) -> None:
    print(line, flush=True)
