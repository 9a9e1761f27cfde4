"""seqio tasks over retrieved files, `<data_dir>/<task>-<split>.jsonl`.

seqio's tasks take no settings. The folder of the files, the filter of training answers and the
vocabulary are therefore settings of the process: `configure` sets them before the tasks are
registered.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from glimmer_jax.corpus import retrieved_notes
from glimmer_jax.data import preprocessors
from glimmer_jax.data.order import shuffled_epochs
from glimmer_jax.data.stream import BLOCK, IndexedSource, Start
from glimmer_jax.kilt.examples import read_examples
from glimmer_jax.storage import local_copy
from glimmer_jax.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

BUILT_IN = Vocabulary("pydocs")
# File names use dev, seqio uses validation.
FILE_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all retrieved tasks of this process."""

    data_dir: str = "data/retrieved"
    min_bleu_score: float = preprocessors.MIN_BLEU  # threshold of KILT's `bleu_score`, 0 to 1
    vocabulary: Vocabulary = BUILT_IN

    def __post_init__(self) -> None:
        score = self.min_bleu_score
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"MIN_BLEU_SCORE must be a number from 0 to 1, got {score!r}.")


_settings = Settings()


def settings() -> Settings:
    """The current settings."""
    return _settings


def configure(
    data_dir: str | Path | None = None,
    min_bleu_score: float | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Replaces the settings of all retrieved tasks; None selects the default.

    Call it before the tasks are registered, because a registered task keeps its vocabulary.

    Args:
      data_dir: folder of the retrieved files, local or in a bucket.
      min_bleu_score: training answers with a lower `bleu_score` are dropped; from 0 to 1.
      vocabulary: of questions and answers.

    Raises:
      ValueError: the score is not a number from 0 to 1.
    """
    global _settings
    _settings = Settings(
        data_dir=Settings.data_dir if data_dir is None else str(data_dir),
        min_bleu_score=Settings.min_bleu_score if min_bleu_score is None else min_bleu_score,
        vocabulary=BUILT_IN if vocabulary is None else vocabulary,
    )


def retrieved_file(task: str, split: str) -> Path:
    """The file of a task and split; for a bucket, its local copy.

    Raises:
      ValueError: the split is unknown or there is no file.
    """
    path = local_copy.fetch_file("DATA_DIR", _place(task, split))
    if not path.is_file():
        raise ValueError(
            f"DATA_DIR: there is no retrieved file {path}. Set DATA_DIR to the folder that "
            "--run_mode=retrieve wrote, or run it with --gin_file=gin/runs/retrieve.gin."
        )
    return path


def _place(task: str, split: str) -> str:
    if split not in FILE_SPLITS:
        raise ValueError(f"Splits are {', '.join(FILE_SPLITS)}; got {split!r}.")
    return f"{settings().data_dir.rstrip('/')}/{task}-{FILE_SPLITS[split]}.jsonl"


def read_split(
    task: str, split: str, min_bleu: float = preprocessors.MIN_BLEU
) -> preprocessors.Columns:
    """Features of all examples; training examples are filtered by provenance.

    The complete file is read and checked first, so that an invalid line fails the job at its start.
    A process reads a file that has not changed only once.

    Args:
      task: as in the file names.
      split: train, validation or test.
      min_bleu: minimum `bleu_score` of a training answer, from 0 to 1.

    Raises:
      ValueError: the file is missing, or is not the one that its note describes, a line is invalid,
        or no example remains.
    """
    path = retrieved_file(task, split)
    status = path.stat()
    is_training = split == "train"
    place = _place(task, split)
    identity = (
        place,
        retrieved_notes.file_sha256(place),
        (status.st_size, status.st_mtime_ns, status.st_ino),
    )
    return _read_file(path, identity, is_training, min_bleu if is_training else 0.0)


# As many as KILT's tasks have splits. Training and evaluation keep what they read anyway.
@functools.lru_cache(maxsize=33)
def _read_file(
    path: Path, identity: tuple[Any, ...], is_training: bool, threshold: float
) -> preprocessors.Columns:
    """`identity` changes when the file does; it holds its place and its checksum."""
    place, sha256, _ = identity
    retrieved_notes.check_content(place, path, sha256)
    seen: collections.Counter[bool] = collections.Counter()

    def features() -> Iterator[dict[str, Any]]:
        for line in read_examples(path):
            example = preprocessors.example_features(line, threshold)
            if is_training and example is not None and not example["answers"]:
                example = None  # it would teach to answer nothing
            seen[example is not None] += 1
            if example is not None:
                yield example

    kept = preprocessors.Columns(features())
    num_dropped = seen[False]
    if not len(kept) and num_dropped:
        raise ValueError(
            f"All {num_dropped} examples of {path} are dropped: they have no answers in `output`, or "
            f"only ones with a bleu_score below MIN_BLEU_SCORE={threshold:g}."
        )
    if not len(kept):
        raise ValueError(f"DATA_DIR: {path} has no examples. Rerun --run_mode=retrieve.")
    if num_dropped:
        logger.info(
            "%s: %d of %d examples are dropped: no answers, or only ones with a bleu_score below %g.",
            path, num_dropped, num_dropped + len(kept), threshold,
        )  # fmt: skip
    return kept


class RetrievedFiles(IndexedSource):
    """The files of a task; knows their numbers of lines, which mixing rates are computed from."""

    def __init__(
        self,
        file_task: str,
        dataset_fn: Callable[..., Any],
        stream_fn: Callable[[str, int], Start],
        sizes: Mapping[str, int] | None,
    ):
        super().__init__(dataset_fn, tuple(sizes or FILE_SPLITS), stream_fn, sizes)
        self._file_task = file_task

    def num_input_examples(self, split: str) -> int:
        """Raises ValueError where there is no file."""
        known = super().num_input_examples(split)
        return _count_lines(retrieved_file(self._file_task, split)) if known is None else known

    def describe(self, split: str) -> dict[str, Any]:
        """What the examples of a split depend on; None for what is unknown.

        Raises ValueError for a damaged note.
        """
        sha256 = retrieved_notes.file_sha256(_place(self._file_task, split))
        minimum = settings().min_bleu_score if split == "train" else None
        return {"file_sha256": sha256, "min_bleu_score": minimum}


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def register(
    name: str,
    file_task: str,
    metric_fns: Sequence[Callable[..., Any]],
    num_input_examples: Mapping[str, int] | None = None,
) -> Any:
    """Registers the seqio task `name` over the files `<data_dir>/<file_task>-<split>.jsonl`.

    The task supports caching: its cache holds the filtered examples before an answer is drawn.

    Args:
      name: of the task.
      file_task: as in the file names.
      metric_fns: `(targets, predictions) -> {name: value}` with lists of answers as targets, or
        `(targets, predictions, aux_values)`.
      num_input_examples: number of lines of each split's file; the task has only these splits. None
        registers all three splits, whose lines are counted when their number is asked for.

    Returns:
      The seqio task.

    Raises:
      ValueError: a task of this name is already registered.
    """

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        examples = read_split(file_task, split, settings().min_bleu_score)
        if not shuffle_files:
            return examples.dataset()
        # One shuffle of the complete file; seqio's small buffer then changes the order between
        # epochs. A buffer large enough for both would delay every start until it is full.
        order = list(range(len(examples)))
        random.Random(seed).shuffle(order)
        return examples.dataset(order)

    def stream_fn(split: str, seed: int) -> Start:
        examples = read_split(file_task, split, settings().min_bleu_score)

        def blocks(start: int) -> Iterator[np.ndarray]:
            for first in itertools.count(start, BLOCK):
                yield shuffled_epochs(seed, len(examples), first, BLOCK)

        def dataset(start: int) -> tf.data.Dataset:
            order = tf.data.Dataset.from_generator(
                lambda: blocks(start), output_signature=tf.TensorSpec([BLOCK], tf.int64)
            )
            return order.flat_map(examples.dataset)

        return dataset

    text = settings().vocabulary.seqio()
    ids = seqio.PassThroughVocabulary(size=2**63 - 1)
    return seqio.TaskRegistry.add(
        name,
        source=RetrievedFiles(file_task, dataset_fn, stream_fn, num_input_examples),
        preprocessors=[
            seqio.CacheDatasetPlaceholder(),
            preprocessors.draw_answer,
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": seqio.Feature(text, add_eos=False),
            "targets": seqio.Feature(text),
            "passage_ids": seqio.Feature(ids, add_eos=False, dtype=tf.int64),
            "gold_passages": seqio.Feature(ids, add_eos=False, dtype=tf.int32),
        },
        postprocess_fn=preprocessors.all_answers,
        metric_fns=list(metric_fns),
        shuffle_buffer_size=1000,
    )
