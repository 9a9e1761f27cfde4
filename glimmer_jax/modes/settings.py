"""Groups of settings that several run modes share. `gin/runs` binds their fields to macros."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory.lookup import LookupConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.checkpoint import CheckpointConfig, Trained
from glimmer_jax.partitioning import MeshConfig, make_mesh, own_rows
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.serving.step import encode_candidates
from glimmer_jax.vocabulary import Vocabulary

if TYPE_CHECKING:
    from glimmer_jax.data.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A seqio task or mixture, and how it becomes batches; T5X's `DatasetConfig`."""

    mixture_or_task_name: str  # registered with seqio
    # {"inputs": Q, "targets": T, "passages": (K, P)}; None: the checkpoint's.
    task_feature_lengths: Mapping[str, Any] | None
    batch_size: int  # questions per batch, over all devices
    split: str = "train"
    mixture_or_task_module: str | None = None  # imported first; registers the tasks
    data_dir: str | None = None  # folder of the retrieved files, for tasks that read them
    use_cached_tasks: bool = False  # read seqio's caches
    # Training answers with a lower `bleu_score` are left out; None is the tasks' default. A cache
    # was filtered when it was written.
    min_bleu_score: float | None = None

    @property
    def known_lengths(self) -> Mapping[str, Any]:
        """`task_feature_lengths`, after the mode has replaced None."""
        assert self.task_feature_lengths is not None
        return self.task_feature_lengths

    def register(self, vocabulary: Vocabulary) -> None:
        """Configures the retrieved tasks and imports the module that registers them.

        Raises:
          ValueError: there is no such module, mixture or task.
        """
        # seqio and tensorflow take seconds to import: modes check their other settings first.
        from glimmer_jax.data import pipeline, retrieved_tasks

        retrieved_tasks.configure(self.data_dir, self.min_bleu_score, vocabulary)
        pipeline.import_tasks(self.mixture_or_task_module)
        pipeline.find_mixture_or_task(self.mixture_or_task_name)

    def check_fit(
        self, vocabulary: Vocabulary, has_passages: bool, num_examples: int | None = 1000
    ) -> None:
        """Compares the first examples with the settings and prints their counts.

        Args:
          vocabulary: of model and passages.
          has_passages: whether there is a folder or a memory to read passages from.
          num_examples: examples per task; None for all.

        Raises:
          ValueError: see `data.fit.check_fit`.
        """
        from glimmer_jax.data import fit

        counts = fit.check_fit(
            self.mixture_or_task_name,
            self.split,
            self.known_lengths,
            vocabulary=vocabulary,
            has_passages=has_passages,
            use_cached=self.use_cached_tasks,
            examples=num_examples,
        )
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"First examples ({self.split}): {text}")

    def batches(
        self, passages: Passages | None, mesh: Mesh, seed: int, start_step: int
    ) -> Iterator[dict[str, Any]]:
        """Numpy batches from `start_step` on, without end, with this process's rows.

        Args:
          passages: the folder; None for examples that hold their passages, and for a memory.
          mesh: the devices that share a batch.
          seed: of shuffling and of seqio's preprocessors.
          start_step: batches to skip.

        Raises:
          ValueError: see `pipeline.batches`.
        """
        from glimmer_jax.data import pipeline

        return pipeline.batches(
            self.mixture_or_task_name,
            self.split,
            self.known_lengths,
            self.batch_size,
            seed=seed,
            start_step=start_step,
            passages=passages,
            use_cached=self.use_cached_tasks,
            own_rows=own_rows(mesh, self.batch_size),
        )

    def evaluation(
        self,
        passages: Passages | None,
        num_examples: int | None = None,
        log_dir: str | None = None,
    ) -> "Evaluation":
        """The examples as an evaluation; the arguments are those of `data.evaluation.Evaluation`."""
        from glimmer_jax.data.evaluation import Evaluation

        return Evaluation(
            self.mixture_or_task_name,
            self.split,
            self.known_lengths,
            self.batch_size,
            passages=passages,
            num_examples=num_examples,
            use_cached=self.use_cached_tasks,
            # seqio's logger renames files, which only one process may do.
            log_dir=log_dir if jax.process_index() == 0 else None,
        )


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """The passages, and where the reader gets them: encoded now, or from a memory."""

    passages_dir: str | None = None  # written by mode `passages`
    memory_dir: str | None = None  # written by mode `build_memory`; None encodes passages now
    memory_bytes_per_device: int = 0  # a memory that fits into this is kept on the devices
    # Ids that are missing from the memory raise an error, or are masked and counted.
    unknown_passages: Literal["error", "mask"] = "error"

    def __post_init__(self) -> None:
        # Invalid values are rejected also where there is no memory.
        _ = self.lookup

    @property
    def lookup(self) -> LookupConfig:
        """Settings of the memory's lookup."""
        return LookupConfig(self.memory_bytes_per_device, self.unknown_passages)


@dataclasses.dataclass(frozen=True)
class AnsweringConfig(CheckpointConfig):
    """A trained model that answers questions, as its checkpoint records it."""

    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # The only answers allowed, for all questions; None generates answers.
    candidates: Sequence[str] | None = None
    seed: int = 0  # of sampled answers

    def __post_init__(self) -> None:
        checks.seed(self.seed)

    def prepare(
        self, corpus: CorpusConfig, feature_lengths: Mapping[str, Any] | None, batch_size: int
    ) -> "Answering":
        """Reads what the checkpoint records, and checks all settings. Raises ValueError.

        Args:
          corpus: where passages are read.
          feature_lengths: TASK_FEATURE_LENGTHS; None: the checkpoint's.
          batch_size: questions per batch, over all devices.
        """
        trained = self.read(corpus.memory_dir)
        lengths = checks.lengths_for(trained.model.config, trained.feature_lengths(feature_lengths))
        mesh = make_mesh(self.mesh)
        checks.batch_size("BATCH_SIZE", batch_size, mesh)
        checks.passages_divide(lengths, mesh)
        checks.one_answer_rule(self.candidates, trained.model.decode)
        candidates_NT = None
        if self.candidates is not None:
            candidates_NT = encode_candidates(self.candidates, trained.vocabulary, lengths.target)
        return Answering(trained.model, trained.vocabulary, lengths, mesh, candidates_NT)

    def load(
        self,
        answering: "Answering",
        corpus: CorpusConfig,
        batch_sizes: Sequence[int],
        retriever: RetrieverConfig = RetrieverConfig(),
        passages: Passages | None = None,
    ) -> Predictor:
        """The model with its passages and memory; see `Predictor.load`. Raises ValueError.

        Args:
          answering: from `prepare`.
          corpus: where passages are read.
          batch_sizes: numbers of questions that programs are compiled for.
          retriever: of questions without `retrieved`.
          passages: those of `corpus`, if they are open already.
        """
        return Predictor.load(
            self.checkpoint_path,
            answering.lengths,
            model=answering.model,
            passages_dir=corpus.passages_dir if passages is None else passages,
            memory_dir=corpus.memory_dir,
            vocabulary=answering.vocabulary,
            mesh=self.mesh,
            lookup=corpus.lookup,
            retriever=retriever,
            batch_sizes=batch_sizes,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class Answering:
    """A model and its settings, checked, before its weights are read."""

    model: GlimmerModel
    vocabulary: Vocabulary
    lengths: Lengths
    mesh: Mesh
    candidates: np.ndarray | None  # int32 [N, T], tokens of `AnsweringConfig.candidates`


@dataclasses.dataclass(frozen=True)
class EncoderConfig(CheckpointConfig):
    """A trained memory encoder and the passages that it encodes."""

    passages_dir: str | None = None  # written by mode `passages`
    max_length: int | None = None  # P, tokens per passage; None: the checkpoint's, or the passages'
    batch_size: int = 32  # passages per device
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def check_given(self) -> None:
        """Raises ValueError naming required settings that are missing."""
        checks.required(CHECKPOINT_PATH=self.checkpoint_path, PASSAGES_DIR=self.passages_dir)

    def passage_length(self, trained: Trained, corpus: Passages) -> int:
        """P: the setting, that of the checkpoint's training, or the longest that the corpus has."""
        if self.max_length is not None:
            return self.max_length
        lengths = trained.record.task_feature_lengths
        return corpus.max_length if lengths is None else check_lengths(lengths).passage


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model": ..., "batch_size": ...}`: the fields of all groups beside the other settings."""
    flat = dict(settings)
    for group in settings.values():
        if isinstance(group, DatasetConfig | CorpusConfig | CheckpointConfig):
            flat |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return flat
