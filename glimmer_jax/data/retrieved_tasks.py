"""Tasks over retrieved files: `<data_dir>/<task>-<split>.jsonl`, registered with seqio in one call.

Where the files lie, which training answers are sound and which vocabulary is the model's are settings of
the process (`use`), since seqio's tasks take none. They are environment variables, so that a program of
somebody else that imports the tasks can have them too.
"""

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from glimmer_jax.data import preprocessors
from glimmer_jax.kilt.examples import read_examples
from glimmer_jax.storage import local_copy
from glimmer_jax.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# File names say dev, seqio says validation.
FILE_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
DATA_DIR_VARIABLE = "GLIMMER_DATA_DIR"
MIN_BLEU_VARIABLE = "GLIMMER_MIN_BLEU_SCORE"
VOCABULARY_VARIABLE = "GLIMMER_VOCABULARY"
DEFAULT_DATA_DIR = "data/retrieved"


def data_dir() -> str:
    """Folder of the retrieved files: environment variable GLIMMER_DATA_DIR, or data/retrieved."""
    return os.environ.get(DATA_DIR_VARIABLE, DEFAULT_DATA_DIR)


def min_bleu_score() -> float:
    """`preprocessors.answered_by_source`'s threshold: GLIMMER_MIN_BLEU_SCORE, or 0.5.

    Raises ValueError where the variable holds no number from 0 to 1.
    """
    text = os.environ.get(MIN_BLEU_VARIABLE, str(preprocessors.MIN_BLEU))
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise ValueError(
            f"MIN_BLEU_SCORE (or {MIN_BLEU_VARIABLE}) must be a number from 0 to 1, got {text!r}."
        )
    return found


def vocabulary() -> Vocabulary:
    """Of tasks registered without one: the file in GLIMMER_VOCABULARY, or the built-in one."""
    path = os.environ.get(VOCABULARY_VARIABLE)
    return Vocabulary() if path is None else Vocabulary(path)


def use(
    data_dir: str | Path | None = None,
    min_bleu_score: float | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Sets these for all tasks of this process; None leaves one as it is.

    The vocabulary counts for tasks that are registered afterwards.
    """
    if data_dir is not None:
        os.environ[DATA_DIR_VARIABLE] = str(data_dir)
    if min_bleu_score is not None:
        os.environ[MIN_BLEU_VARIABLE] = str(min_bleu_score)
    if vocabulary is not None:
        os.environ[VOCABULARY_VARIABLE] = str(vocabulary.path)


def retrieved_file(task: str, split: str) -> Path:
    """The file of a task and split; of a bucket's, its copy on this disk.

    Raises:
      ValueError: no such split or file.
    """
    if split not in FILE_SPLITS:
        raise ValueError(f"Splits are {', '.join(FILE_SPLITS)}; got {split!r}.")
    file = f"{task}-{FILE_SPLITS[split]}.jsonl"
    path = local_copy.fetch_file("DATA_DIR", f"{data_dir().rstrip('/')}/{file}")
    if not path.is_file():
        raise ValueError(
            f"No retrieved file {path}. Set DATA_DIR (or {DATA_DIR_VARIABLE}) to the folder that "
            "--run_mode=retrieve has written, or run it: --run_mode=retrieve "
            "--gin_file=gin/runs/retrieve.gin."
        )
    return path


def read_split(
    task: str, split: str, min_bleu: float = preprocessors.MIN_BLEU
) -> preprocessors.Columns:
    """Features of all examples; training examples are filtered by provenance.

    The file is read whole and checked before anything is computed, so that a bad line ends a job in
    its first seconds.

    Raises:
      ValueError: file or line at fault, or nothing is left.
    """
    path = retrieved_file(task, split)
    threshold = min_bleu if split == "train" else 0.0
    left_out = 0

    def features() -> Iterator[dict[str, Any]]:
        nonlocal left_out
        for line in read_examples(path):
            one = preprocessors.example_features(line, threshold)
            if one is not None:
                yield one
            else:
                left_out += 1

    kept = preprocessors.Columns(features())
    if not len(kept):
        raise ValueError(f"{path} holds no example{' with sound provenance' if left_out else ''}.")
    if left_out:
        logger.info(
            "%s: %d of %d examples are left out, no answer of theirs has a bleu_score of %g.",
            path, left_out, left_out + len(kept), threshold,
        )  # fmt: skip
    return kept


def register(
    name: str,
    file_task: str,
    metric_fns: Sequence[Callable[..., Any]],
    num_input_examples: Mapping[str, int] | None = None,
) -> Any:
    """Registers the seqio task `name` over the files `<data_dir>/<file_task>-<split>.jsonl`.

    seqio may cache its examples (before an answer is drawn), as they are filtered at that time.

    Args:
      name: of the task.
      file_task: as in the file names.
      metric_fns: `(targets, predictions) -> {name: value}` with lists of answers as targets, or
        `(targets, predictions, aux_values)`.
      num_input_examples: lines of each split's file; splits that are left out do not exist. None: all
        three, of any size.
    """

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        examples = read_split(file_task, split, min_bleu_score())
        if not shuffle_files:
            return examples.dataset()
        # The whole file, once; seqio's buffer then changes the order from epoch to epoch. A larger
        # buffer would do both, and hold up every start until it is full.
        order = list(range(len(examples)))
        random.Random(seed).shuffle(order)
        return examples.dataset(order)

    text = vocabulary().seqio()
    ids = seqio.PassThroughVocabulary(size=2**63 - 1)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            dataset_fn, tuple(num_input_examples or FILE_SPLITS), num_input_examples
        ),
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
