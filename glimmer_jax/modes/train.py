"""Mode `train`: fine-tuning or pre-training on a seqio task or mixture."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glimmer_jax.axes import Lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory.fingerprint import encoder_fingerprint, passages_fingerprint
from glimmer_jax.memory.lookup import DiskLookup
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.mimetic_init import mimetic_init
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.partitioning import MeshConfig, check_divisible, make_mesh, own_rows
from glimmer_jax.retrieval import corpus_check
from glimmer_jax.serving.step import Predict
from glimmer_jax.storage import folder
from glimmer_jax.training import loop
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import TrainState
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import parameters
from glimmer_jax.weights.model_config import describe

if TYPE_CHECKING:
    from glimmer_jax.data.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated while training, every `TrainConfig.eval_every` steps."""

    split: str = "validation"
    num_examples: int | None = 256  # of each task; None for all
    batch_size: int | None = None  # None: that of training


def train(
    model: GlimmerModel,
    model_dir: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, Any],
    batch_size: int,
    loop_config: loop.TrainConfig,
    optimizer: OptimizerConfig,
    passages_dir: str | None = None,
    mixture_or_task_module: str | None = None,
    data_dir: str | None = None,
    initial_checkpoint_path: str | None = None,
    memory_dir: str | None = None,
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
    split: str = "train",
    evaluation: EvalConfig = EvalConfig(),
    use_cached_tasks: bool = False,
    min_bleu_score: float | None = None,
    matching: bool = False,
    operative_config: Callable[[], str] = str,
) -> None:
    """Trains until `loop_config.total_steps`; started again, goes on where it was.

    Args:
      model: FiD, LUMEN or GLIMMER.
      model_dir: folder of the run: checkpoints, metrics, the operative gin config.
      mixture_or_task_name: registered with seqio.
      task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      batch_size: questions a step over all devices.
      loop_config: steps and intervals.
      optimizer: what trains, and how fast.
      passages_dir: passages folder for tasks with `passage_ids`.
      mixture_or_task_module: imported first; registers the tasks.
      data_dir: folder of retrieved files for tasks that read them.
      initial_checkpoint_path: parameters to start from, of any cut of the same sizes.
      memory_dir: read passages as memory; the memory encoder must be frozen, and the store made
        with the initial checkpoint.
      mesh: devices.
      vocabulary: of tasks and passages.
      split: the seqio split to train on.
      evaluation: the dev set.
      use_cached_tasks: read seqio's caches.
      min_bleu_score: training answers found again in the knowledge source less than this are left out
        (KILT's `bleu_score`); None for the tasks' own. A cache was filtered when it was made.
      matching: fresh parameters are those of `models.matching` instead of T5's.
      operative_config: text of the configuration in force, saved beside the checkpoints.

    Raises:
      ValueError: settings, files or lengths that do not fit together.
    """
    checks.required(MODEL_DIR=model_dir, MIXTURE_OR_TASK_NAME=mixture_or_task_name)
    lengths = checks.lengths_for(model.config, task_feature_lengths)
    checks.vocabulary_fits(model, vocabulary)
    devices = make_mesh(mesh)
    checks.batch_size("BATCH_SIZE", batch_size, devices, loop_config.num_microbatches)
    eval_batch = evaluation.batch_size or batch_size
    checks.batch_size("BATCH_SIZE (of evaluation)", eval_batch, devices)
    shapes, names = model.abstract_variables()
    check_divisible(shapes, names, devices)
    checks.passages_divide(lengths, devices)
    if memory_dir is not None and not (model.config.freeze_memory and initial_checkpoint_path):
        raise ValueError(
            "Training from MEMORY_DIR needs a frozen memory encoder (FREEZE_MEMORY = True) and the "
            "INITIAL_CHECKPOINT_PATH that the memory was made with."
        )
    if model.config.has_codebooks and initial_checkpoint_path is None:
        raise ValueError(
            f"MEMORY_CODEC={model.config.memory_codec!r} rounds memory by codebooks, which are learnt "
            "from a trained encoder. Learn them with --run_mode=codebooks, and give the file that it "
            "writes as INITIAL_CHECKPOINT_PATH."
        )
    if memory_dir is not None and model.config.train_codebooks:
        raise ValueError(
            "Stored memory keeps the codes of the codebooks that it was built with: set "
            "TRAIN_CODEBOOKS = False to train from MEMORY_DIR, or train from passages."
        )
    passages = None
    if passages_dir is not None:
        passages = Passages.open(passages_dir, vocabulary.fingerprint)
        passages.warn_of_cuts(lengths.passage)
        if data_dir is not None:
            corpus_check.check(data_dir, passages)
    corpus = None if passages is None else passages_fingerprint(passages.manifest)
    if memory_dir is not None:
        passages = None
    initial = None
    if initial_checkpoint_path is not None:
        # Read when it is needed: a run that goes on has its own.
        initial = functools.partial(
            parameters.load, initial_checkpoint_path, model, vocabulary.fingerprint
        )
    config_text = operative_config()
    # seqio and tensorflow take seconds to import: not before the checks above.
    from glimmer_jax.data import pipeline, retrieved_tasks
    from glimmer_jax.data.evaluation import Evaluation
    from glimmer_jax.metrics import qa

    retrieved_tasks.configure(data_dir, min_bleu_score, vocabulary)
    pipeline.import_tasks(mixture_or_task_module)
    counts = pipeline.check_fit(
        mixture_or_task_name,
        split,
        task_feature_lengths,
        vocabulary=vocabulary,
        has_passages=passages is not None or memory_dir is not None,
        use_cached=use_cached_tasks,
    )
    print("First examples: " + ", ".join(f"{name} {n}" for name, n in counts.items()))

    dev: Evaluation | None = None
    if loop_config.eval_every:
        dev = Evaluation(
            mixture_or_task_name,
            evaluation.split,
            task_feature_lengths,
            eval_batch,
            passages=passages,
            num_examples=evaluation.num_examples,
            use_cached=use_cached_tasks,
            # seqio's logger renames files, which only one process may do.
            log_dir=os.path.join(folder.local_path(model_dir), "dev")
            if jax.process_index() == 0
            else None,
        )
        if loop_config.best_metric is not None:
            probe = Evaluation(
                mixture_or_task_name,
                evaluation.split,
                task_feature_lengths,
                eval_batch,
                num_examples=1,
                use_cached=use_cached_tasks,
            )
            check_best_metric(loop_config.best_metric, probe, lengths, model.config.num_kept)

    metadata = {
        **describe(model.config, vocabulary.fingerprint),
        "mixture_or_task_name": mixture_or_task_name,
        "split": split,
        "task_feature_lengths": dict(task_feature_lengths),
        "batch_size": batch_size,
        "min_bleu_score": min_bleu_score,
        "use_cached_tasks": use_cached_tasks,
        "initial_checkpoint_path": initial_checkpoint_path,
        "schedule_end": optimizer.schedule_end(),
        "operative_config": config_text,
    }
    trained = make_optimizer(optimizer, names, model.frozen(shapes))
    with loop.Run(loop_config, model, trained, devices, model_dir, metadata) as run:
        state = run.restore(
            lambda: fresh_params(model, lengths, loop_config.seed, matching), initial
        )
        lookup: DiskLookup | None = None
        if memory_dir is not None:
            fingerprint = encoder_fingerprint(state.params, model.config)
            store = MemoryStore.open(
                memory_dir,
                fingerprint,
                vocabulary.fingerprint,
                codec=model.config.memory_codec,
            )
            if corpus is not None:
                store.check_passages(corpus)
            lookup = DiskLookup(store, lengths.passage)
        _save_config(model_dir, config_text)
        batches = pipeline.batches(
            mixture_or_task_name,
            split,
            task_feature_lengths,
            batch_size,
            seed=loop_config.seed,
            start_step=int(state.step),
            passages=passages,
            use_cached=use_cached_tasks,
            own_rows=own_rows(devices, batch_size),
        )
        if lookup is not None:
            batches = lookup.prefetch(batches)
        predict = Predict(model, devices, lookup)

        def evaluate(state: TrainState, poll: Callable[[], None]) -> dict[str, float]:
            assert dev is not None

            def answer(batch: dict[str, Any]) -> Any:
                poll()
                return predict(state.params, batch)

            step = int(state.step)
            return qa.with_mean(dev.run(answer, step=step, prefetch=predict.prefetch))

        run.train(state, batches, evaluate)


def fresh_params(model: GlimmerModel, lengths: Lengths, seed: int, matching: bool = False) -> Any:
    """Random parameters; traceable."""
    shapes = {
        "question_tokens": (1, lengths.question),
        "passage_tokens": (1, lengths.passages, lengths.passage),
        "decoder_input_tokens": (1, lengths.target),
    }
    params = model.get_initial_variables(jax.random.key(seed), shapes)["params"]
    return mimetic_init(params, model.config.t5) if matching else params


def check_best_metric(
    name: str, evaluation: "Evaluation", lengths: Lengths, num_kept: int | None
) -> None:
    """Asks for the names of the dev metrics before training, by evaluating empty answers.

    Raises:
      ValueError: the best checkpoint could not be chosen by `name`.
    """

    def empty_answers(batch: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rows, passages = len(batch["question_tokens"]), lengths.passages
        kept = np.arange(num_kept or passages, dtype=np.int32)
        aux = {
            "scores": np.zeros(rows, np.float32),
            "passage_scores": np.zeros((rows, passages), np.float32),
            "kept_passages": np.broadcast_to(kept, (rows, kept.size)),
        }
        if "gold_passages" in batch:
            aux["gold_passages"] = batch["gold_passages"]
        return np.zeros((rows, lengths.target), np.int32), aux

    from glimmer_jax.metrics.qa import with_mean

    names = with_mean(evaluation.run(empty_answers))
    if name not in names:
        why = " (mean is that of exact_match and accuracy over tasks)" if name == "mean" else ""
        raise ValueError(
            f"BEST_METRIC={name!r} is none of the dev metrics{why}; there are {sorted(names)}. Set it "
            "to one of these, or to None."
        )


def _save_config(model_dir: str, text: str) -> None:
    if jax.process_index() == 0 and text:
        folder.write_file(folder.open_folder(model_dir), "config.gin", text.encode())
