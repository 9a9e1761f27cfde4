"""Mode `train`: fine-tuning or pre-training on a seqio task or mixture."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glimmer_jax.axes import Lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory.fingerprint import encoder_fingerprint, passages_fingerprint
from glimmer_jax.memory.lookup import DiskLookup
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.metrics import qa
from glimmer_jax.metrics.reranking import warn_of_reranking
from glimmer_jax.models.mimetic_init import mimetic_init
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks, early, outputs
from glimmer_jax.modes.settings import CorpusConfig, DatasetConfig
from glimmer_jax.partitioning import MeshConfig, check_divisible, make_mesh
from glimmer_jax.serving.step import Predict
from glimmer_jax.storage import folder
from glimmer_jax.training import loop
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import TrainState
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import huggingface, parameters, steps
from glimmer_jax.weights.find_vocabulary import (
    check_vocabulary_fits,
    find_vocabulary,
    is_recorded,
)
from glimmer_jax.weights.load import read_record
from glimmer_jax.weights.model_config import describe

if TYPE_CHECKING:
    from glimmer_jax.data.evaluation import Evaluation

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The dev set, evaluated every `TrainConfig.eval_every` steps."""

    split: str = "validation"
    num_examples: int | None = 256  # of each task; None for all
    batch_size: int | None = None  # None: that of training


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The parameters that a new run starts from."""

    checkpoint_path: str | None = None  # of any cut of the same sizes; None for random parameters
    mimetic: bool = False  # random parameters are those of `models.mimetic_init`, not T5's


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """The vocabulary of a run."""

    path: str | None = None  # `Vocabulary.path`; None: the initial checkpoint's
    # Accept an embedding with more rows than the vocabulary, padded to a multiple of 128, fills.
    allow_unused_embeddings: bool = False


def train(
    model: GlimmerModel,
    model_dir: str,
    dataset: DatasetConfig,
    corpus: CorpusConfig,
    loop_config: loop.TrainConfig,
    optimizer: OptimizerConfig,
    init: InitConfig = InitConfig(),
    evaluation: EvalConfig = EvalConfig(),
    mesh: MeshConfig = MeshConfig(),
    vocabulary_config: VocabularyConfig = VocabularyConfig(),
    operative_config: Callable[[], str] = str,
) -> None:
    """Trains until `loop_config.total_steps`; rerunning resumes from the newest checkpoint.

    Args:
      model: FiD, LUMEN or GLIMMER.
      model_dir: folder of the run: checkpoints, metrics, the operative gin config.
      dataset: the training examples.
      corpus: passages for tasks with `passage_ids`. With a memory, the memory encoder must be
        frozen and the memory built from the initial checkpoint.
      loop_config: steps and intervals.
      optimizer: the optimizer and its schedule.
      init: where a new run starts.
      evaluation: the dev set.
      mesh: devices.
      vocabulary_config: of tasks and passages; that of the initial checkpoint if none is given.
      operative_config: returns the text of the operative configuration, saved with the checkpoints.

    Raises:
      ValueError: settings, files or lengths that do not fit together.
    """
    # Settings, without reading anything.
    checks.required(MODEL_DIR=model_dir, MIXTURE_OR_TASK_NAME=dataset.mixture_or_task_name)
    checks.seed(loop_config.seed)
    lengths = checks.lengths_for(model.config, dataset.task_feature_lengths)
    devices = make_mesh(mesh)
    dev_batch = evaluation.batch_size or dataset.batch_size
    dev_dataset = dataclasses.replace(dataset, split=evaluation.split, batch_size=dev_batch)
    checks.batch_size("BATCH_SIZE", dataset.batch_size, devices, loop_config.num_microbatches)
    checks.batch_size("BATCH_SIZE (of evaluation)", dev_batch, devices)
    shapes, names = model.abstract_variables()
    check_divisible(shapes, names, devices)
    checks.passages_divide(lengths, devices)
    _check_memory(model, corpus, init)
    vocabulary = _open_vocabulary(vocabulary_config, model, init, model_dir)

    # Task, passages and examples. seqio and tensorflow take seconds to import.
    dataset.register(vocabulary)
    passages = checks.open_passages(corpus.passages_dir, dataset.data_dir, vocabulary)
    if passages is not None:
        passages.warn_of_cuts(lengths.passage)
    has_passages = passages is not None or corpus.memory_dir is not None
    encoded_now = passages if corpus.memory_dir is None else None
    dataset.check_fit(vocabulary, has_passages)
    dev = None
    if loop_config.eval_every:
        dev_dataset.check_fit(vocabulary, has_passages, evaluation.num_examples)
        logs = os.path.join(folder.local_path(model_dir), "dev")
        dev = dev_dataset.evaluation(encoded_now, evaluation.num_examples, logs)
    if loop_config.best_metric is not None:
        probe = dev_dataset.evaluation(None, num_examples=1)
        check_best_metric(loop_config.best_metric, probe, lengths, model.config.num_kept)

    # The run: its own newest checkpoint, the initial checkpoint, or random parameters.
    config_text = operative_config()
    metadata = _metadata(model, vocabulary, dataset, init, optimizer, config_text)
    fresh = functools.partial(fresh_params, model, loop_config.seed, init.mimetic)
    load_initial = None
    if init.checkpoint_path is not None:
        load_initial = functools.partial(
            parameters.load, init.checkpoint_path, model, vocabulary.fingerprint
        )
    trained = make_optimizer(optimizer, names, model.frozen(shapes))
    with loop.Run(loop_config, model, trained, devices, model_dir, metadata) as run:
        state = run.restore(fresh, load_initial)
        batches = dataset.batches(encoded_now, devices, loop_config.seed, int(state.step))
        lookup: DiskLookup | None = None
        if corpus.memory_dir is not None:
            store = _open_memory(corpus.memory_dir, state.params, model, vocabulary, passages)
            lookup = DiskLookup(store, lengths.passage)
            batches = lookup.prefetch(batches)
        _save_config(model_dir, config_text, vocabulary)
        evaluate = None
        if dev is not None:
            evaluate = _dev_metrics(dev, Predict(model, devices, lookup), passages)
        run.train(state, batches, evaluate)


def _metadata(
    model: GlimmerModel,
    vocabulary: Vocabulary,
    dataset: DatasetConfig,
    init: InitConfig,
    optimizer: OptimizerConfig,
    config_text: str,
) -> dict[str, Any]:
    """The record of every checkpoint: its model, and the settings that resuming compares (`restore`)."""
    from glimmer_jax.data import stream

    return {
        **describe(model.config, vocabulary.fingerprint),
        "data_order": stream.DATA_ORDER,
        "mixture_or_task_name": dataset.mixture_or_task_name,
        "split": dataset.split,
        "task_feature_lengths": dict(dataset.known_lengths),
        "batch_size": dataset.batch_size,
        "min_bleu_score": dataset.min_bleu_score,
        "use_cached_tasks": dataset.use_cached_tasks,
        "initial_checkpoint_path": init.checkpoint_path,
        "schedule_end": optimizer.schedule_end(),
        "operative_config": config_text,
    }


def _open_memory(
    memory_dir: str,
    params: Any,
    model: GlimmerModel,
    vocabulary: Vocabulary,
    passages: Passages | None,
) -> MemoryStore:
    """The memory, which must be that of the model's encoder and of the passages, if given."""
    encoder = encoder_fingerprint(params, model.config)
    codec = model.config.memory_codec
    store = MemoryStore.open(memory_dir, encoder, vocabulary.fingerprint, codec=codec)
    if passages is not None:
        store.check_passages(passages_fingerprint(passages.manifest))
    return store


def _open_vocabulary(
    config: VocabularyConfig, model: GlimmerModel, init: InitConfig, model_dir: str
) -> Vocabulary:
    """The vocabulary given, or that of the initial checkpoint; checked against both."""
    path, record = config.path, None
    resumed = not _is_new(model_dir)
    if resumed:
        # A resumed run does not need its initial checkpoint any more.
        path = path or os.path.join(folder.local_path(model_dir), huggingface.VOCABULARY)
    elif init.checkpoint_path is not None:
        early.existing_checkpoint("INITIAL_CHECKPOINT_PATH", init.checkpoint_path)
        record = read_record(init.checkpoint_path)
    vocabulary = find_vocabulary(path, record, init.checkpoint_path)
    # A resumed run was checked when it began.
    own = resumed or is_recorded(vocabulary, record)
    check_vocabulary_fits(model, vocabulary, allow_unused=own or config.allow_unused_embeddings)
    return vocabulary


def _is_new(model_dir: str) -> bool:
    """Whether the run has no checkpoint of its own."""
    # Steps, not files: a bucket may hold an empty object for the folder from the start.
    return not steps.list_steps(os.path.join(folder.local_path(model_dir), "checkpoints"))


def _check_memory(model: GlimmerModel, corpus: CorpusConfig, init: InitConfig) -> None:
    """Raises ValueError for codebooks without a checkpoint, or a memory that training would change."""
    config = model.config
    if corpus.memory_dir is not None and not (config.freeze_memory and init.checkpoint_path):
        raise ValueError(
            "MEMORY_DIR: training from memory needs a frozen memory encoder (FREEZE_MEMORY = True) "
            "and the INITIAL_CHECKPOINT_PATH that the memory was built from."
        )
    if config.has_codebooks and init.checkpoint_path is None:
        raise ValueError(
            f"MEMORY_CODEC={config.memory_codec!r} needs codebooks, which are learned from a trained "
            "encoder. Run --run_mode=codebooks and give its file as INITIAL_CHECKPOINT_PATH."
        )
    if corpus.memory_dir is not None and config.train_codebooks:
        raise ValueError(
            "TRAIN_CODEBOOKS: a stored memory keeps the codebooks that it was built with. Set "
            "TRAIN_CODEBOOKS = False to train from MEMORY_DIR, or train from passages."
        )


def _dev_metrics(dev: "Evaluation", predict: Predict, passages: Passages | None) -> loop.Evaluate:
    """`loop.Evaluate` over the dev set, with the retriever's metrics as a baseline."""

    retriever = dev.retriever(passages)

    def evaluate(state: TrainState, poll: Callable[[], None]) -> dict[str, float]:
        def answer(batch: dict[str, Any]) -> Any:
            poll()
            return predict(state.params, batch)

        step = int(state.step)
        metrics = qa.with_mean(dev.run(answer, step=step, prefetch=predict.prefetch))
        metrics |= retriever
        warn_of_reranking(metrics)
        return metrics

    return evaluate


def fresh_params(model: GlimmerModel, seed: int, mimetic: bool = False) -> Any:
    """Random parameters; can be traced."""
    params = model.init_params(jax.random.key(seed))
    return mimetic_init(params, model.config.t5) if mimetic else params


def check_best_metric(
    name: str, evaluation: "Evaluation", lengths: Lengths, num_kept: int | None
) -> None:
    """Finds the names of the dev metrics before training, by evaluating empty answers.

    Raises:
      ValueError: `name` is not a dev metric.
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

    names = qa.with_mean(evaluation.run(empty_answers))
    if name not in names:
        why = " (mean averages exact_match and accuracy over tasks)" if name == "mean" else ""
        raise ValueError(
            f"BEST_METRIC={name!r} is not a dev metric{why}. Set it to one of {sorted(names)}, or to "
            "None."
        )


def _save_config(model_dir: str, text: str, vocabulary: Vocabulary) -> None:
    if jax.process_index() == 0:
        if changed := outputs.changed_settings(model_dir, text):
            logger.warning(
                "MODEL_DIR: %s was trained with other settings so far: %s.",
                model_dir,
                "; ".join(changed),
            )
        store = folder.open_folder(model_dir)
        folder.write_file(store, huggingface.VOCABULARY, Path(vocabulary.path).read_bytes())
        if text:
            folder.write_file(store, "config.gin", text.encode())
