"""Tasks over retrieved files: `<data_dir>/<task>-<split>.jsonl`, registered with seqio in one call."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from glimmer_jax.data import preprocessors
from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.kilt import read_examples

# File names say dev, seqio says validation.
FILE_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
DATA_DIR_VARIABLE = "GLIMMER_DATA_DIR"
DEFAULT_DATA_DIR = "data/retrieved"


def data_dir() -> Path:
    """Folder of the retrieved files: environment variable GLIMMER_DATA_DIR, or data/retrieved."""
    return Path(os.environ.get(DATA_DIR_VARIABLE, DEFAULT_DATA_DIR))


def use_data_dir(path: str | Path | None) -> None:
    """Sets the folder for all tasks of this process; None leaves it."""
    if path is not None:
        os.environ[DATA_DIR_VARIABLE] = str(path)


def retrieved_file(task: str, split: str) -> Path:
    """The file of a task and split.

    Raises:
      ValueError: no such split or file.
    """
    if split not in FILE_SPLITS:
        raise ValueError(f"Splits are {', '.join(FILE_SPLITS)}; got {split!r}.")
    path = data_dir() / f"{task}-{FILE_SPLITS[split]}.jsonl"
    if not path.is_file():
        raise ValueError(
            f"No retrieved file {path}. Set DATA_DIR (or {DATA_DIR_VARIABLE}) to the folder that "
            "--run_mode=retrieve has written, or run it: --run_mode=retrieve "
            "--gin_file=gin/runs/retrieve.gin."
        )
    return path


def read_split(
    task: str, split: str, min_bleu: float = preprocessors.MIN_BLEU
) -> list[dict[str, Any]]:
    """Features of all examples; training examples are filtered by provenance.

    The file is read whole and checked before anything is computed, so that a bad line ends a job in
    its first seconds.

    Raises:
      ValueError: file or line at fault, or nothing is left.
    """
    path = retrieved_file(task, split)
    threshold = min_bleu if split == "train" else 0.0
    made = [preprocessors.example_features(line, threshold) for line in read_examples(path)]
    kept = [one for one in made if one is not None]
    if not kept:
        raise ValueError(f"{path} holds no example{' with sound provenance' if made else ''}.")
    return kept


def register(
    name: str,
    file_task: str,
    metric_fns: Sequence[Callable[..., Any]],
    vocabulary: Vocabulary = Vocabulary(),
    min_bleu: float = preprocessors.MIN_BLEU,
) -> Any:
    """Registers the seqio task `name` over the files `<data_dir>/<file_task>-<split>.jsonl`.

    Args:
      name: of the task.
      file_task: as in the file names.
      metric_fns: `(targets, predictions) -> {name: value}` with lists of answers as targets, or
        `(targets, predictions, aux_values)`.
      vocabulary: of questions and answers.
      min_bleu: see `preprocessors.answered_by_source`.
    """

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        examples = read_split(file_task, split, min_bleu)
        if shuffle_files:
            # The whole file, once; seqio's buffer then changes the order from epoch to epoch. A
            # larger buffer would do both, and hold up every start until it is full.
            random.Random(seed).shuffle(examples)
        return preprocessors.to_dataset(examples)

    text = vocabulary.seqio()
    ids = seqio.PassThroughVocabulary(size=2**63 - 1)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=tuple(FILE_SPLITS)),
        preprocessors=[
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
