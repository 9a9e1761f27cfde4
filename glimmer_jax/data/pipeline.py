"""Batches of the contract from seqio: one deterministic stream, resumable at any step.

Every process draws the same global stream of questions and passage ids, keeps its own rows of each
batch, and fetches passages for those only; so results do not depend on the number of processes. The
position in the stream is the step alone: a restarted run skips what was seen.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seqio

from glimmer_jax.axes import check_lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.data.features import NO_PASSAGE, GlimmerFeatureConverter
from glimmer_jax.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


def import_tasks(module: str | None) -> None:
    """Imports the module whose import registers tasks, for example `tasks.pydocs`.

    Raises:
      ValueError: there is no such module.
    """
    if module is None:
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(
            f"No module {module!r} to import tasks from. MIXTURE_OR_TASK_MODULE names a Python "
            "module, such as 'tasks.pydocs'."
        ) from None


def find_mixture_or_task(name: str) -> Any:
    """The registered mixture or task.

    Raises:
      ValueError: nothing of that name is registered.
    """
    known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    if name not in known:
        raise ValueError(
            f"No mixture or task {name!r} is registered; there are {', '.join(known) or 'none'}. "
            "Check MIXTURE_OR_TASK_NAME and MIXTURE_OR_TASK_MODULE."
        )
    return seqio.get_mixture_or_task(name)


def batches(
    mixture_or_task_name: str,
    split: str,
    lengths: Mapping[str, Any],
    batch_size: int,
    *,
    seed: int = 0,
    start_step: int = 0,
    passages: Passages | None = None,
    repeat: bool = True,
    use_cached: bool = False,
    own_rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """This process's rows of every batch, from `start_step` on.

    Args:
      mixture_or_task_name: registered with seqio.
      split: train, validation or test.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      batch_size: rows of a batch over all processes.
      seed: of shuffling, mixing and drawing answers.
      start_step: batches to leave out at the beginning.
      passages: where the passages of `passage_ids` are read; None leaves them to a memory lookup.
      repeat: True shuffles and never ends; False is one pass in order, its last batch filled up
        with empty rows (all padding, loss weight 0).
      use_cached: read seqio's cache of the task.
      own_rows: which rows of each batch are kept (`partitioning.own_rows`); None keeps all.

    Raises:
      ValueError: unknown name, lengths or batch size that do not fit, or bad data files.
    """
    find_mixture_or_task(mixture_or_task_name)
    passage_length = check_lengths(lengths)[3]
    if batch_size < 1:
        raise ValueError(f"BATCH_SIZE must be at least 1, got {batch_size}.")
    ds = seqio.get_dataset(
        mixture_or_task_name,
        dict(lengths),
        GlimmerFeatureConverter(),
        dataset_split=split,
        shuffle=repeat,
        num_epochs=None if repeat else 1,
        use_cached=use_cached,
        seed=seed,
    )
    ds = ds.skip(start_step * batch_size).batch(batch_size)
    return _rows(ds, batch_size, passages, passage_length, own_rows)


def _rows(
    ds: Any,
    batch_size: int,
    passages: Passages | None,
    passage_length: int,
    own_rows: np.ndarray | None,
) -> Iterator[Batch]:
    own = slice(None) if own_rows is None else own_rows
    for batch in ds.as_numpy_iterator():
        rows = {name: x[own] for name, x in fill(batch, batch_size).items()}
        yield attach(rows, passages, passage_length)


def fill(batch: Mapping[str, np.ndarray], batch_size: int) -> Batch:
    """A batch with empty rows up to `batch_size`."""
    filled = {}
    for name, x in batch.items():
        value = NO_PASSAGE if name == "passage_ids" else 0
        missing = [(0, batch_size - len(x)), *[(0, 0)] * (x.ndim - 1)]
        filled[name] = np.pad(x, missing, constant_values=value)
    return filled


def attach(batch: Batch, passages: Passages | None, length: int) -> Batch:
    """The batch with `passage_tokens [B, K, P]` for its `passage_ids`, which stay for reports."""
    if passages is None or "passage_ids" not in batch:
        return batch
    rows = passages.rows(batch["passage_ids"])
    return {**batch, "passage_tokens": passages.tokens(rows, length)}


def check_fit(
    mixture_or_task_name: str,
    split: str,
    lengths: Mapping[str, Any],
    *,
    vocabulary: Vocabulary,
    has_passages: bool,
    use_cached: bool = False,
    examples: int | None = 1000,
    max_cut: float = 0.1,
) -> dict[str, int]:
    """Compares every task, and its first examples, with the settings, before anything is compiled.

    Whatever is cut is counted; outside of the training split it is logged as a warning, since a
    question or an answer without its end is evaluated wrongly.

    Args:
      mixture_or_task_name: registered with seqio.
      split: train, validation or test.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      vocabulary: that of model and passages.
      has_passages: whether there is a folder or a memory to read passages from.
      use_cached: read seqio's cache of the tasks.
      examples: of each task that are looked at; None for all.
      max_cut: share of questions, and of answers, that may be longer than their lengths.

    Returns:
      Counts over all tasks: `examples`, and of them `questions_cut`, `answers_cut`, `passages_cut` (one
      or more of the passages that an example holds itself; those in a folder are
      `Passages.warn_of_cuts`'s) and `without_gold` (no passage that is known to answer).

    Raises:
      ValueError: a task has another vocabulary, its passages are ids that nothing resolves, no
        example has an answer or as many passages as K, or more than `max_cut` of the questions or of
        the answers are longer than Q or T.
    """
    num_passages = check_lengths(lengths).passages
    counts = dict.fromkeys(
        ("examples", "questions_cut", "answers_cut", "passages_cut", "without_gold"), 0
    )
    for task in seqio.get_subtasks(find_mixture_or_task(mixture_or_task_name)):
        for feature in ("inputs", "targets"):
            if task.output_features[feature].vocabulary != vocabulary.seqio():
                raise ValueError(
                    f"The {feature} of {task.name} have the vocabulary "
                    f"{task.output_features[feature].vocabulary}, and model and passages have "
                    f"{vocabulary.path}. Register the task with that one, or give the task's."
                )
        if "passage_ids" in task.output_features and not has_passages:
            raise ValueError(
                f"The examples of {task.name} name their passages by id: set PASSAGES_DIR to the "
                "folder they were retrieved from, or MEMORY_DIR to its memory."
            )
        if split not in task.splits:
            raise ValueError(
                f"{task.name} has no {split} examples, only {', '.join(task.splits)}. Leave it out of "
                "MIXTURE_OR_TASK_NAME, or take another split."
            )
        ds = task.get_dataset(None, split, use_cached, shuffle=False, num_epochs=1)
        most = seen = answered = 0
        found: dict[str, list[int]] = {"inputs": [], "targets": [], "passages": []}
        for example in ds.take(-1 if examples is None else examples).as_numpy_iterator():
            seen += 1
            for key, longest in found.items():
                longest.append(_longest(example.get(key), num_passages))
            most = max(most, len(example.get("passage_ids", example.get("passages"))))
            answered += bool(np.any(example["targets"] > vocabulary.eos_id))
            counts["without_gold"] += not np.any(example.get("gold_passages", 1))
        if not answered:
            raise ValueError(
                f"No {split} example of {task.name} has an answer to compare with: KILT keeps those of "
                "its test files back. Take another split, or answer the file with --run_mode=infer."
            )
        if most < num_passages:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS asks for K={num_passages} passages, and the {split} examples "
                f"of {task.name} have {most} at most. Retrieve {num_passages}, or lower K."
            )
        counts["examples"] += seen
        for name, key in (
            ("questions", "inputs"),
            ("answers", "targets"),
            ("passages", "passages"),
        ):
            length = lengths[key] if key != "passages" else lengths[key][1]
            count = sum(one > length for one in found[key])
            counts[f"{name}_cut"] += count
            # Of ten passages one may well be longer, and rarely is it the one that answers.
            if key != "passages" and count > max_cut * seen:
                raise ValueError(
                    f"{count} of {seen} {name} of {task.name} ({split}) are longer than the {length} "
                    f"tokens that TASK_FEATURE_LENGTHS[{key!r}] gives them. Raise it."
                )
            if count and split != "train":
                logger.warning(
                    "%d of %d %s of %s (%s) are longer than the %d tokens that TASK_FEATURE_LENGTHS[%r]"
                    " gives them, and are cut; the longest has %d.",
                    count, seen, name, task.name, split, length, key, max(found[key]),
                )  # fmt: skip
    return counts


def _longest(tokens: np.ndarray | None, num_passages: int) -> int:
    """Tokens of `[n]`, or of the longest of the first passages `[K, P]` padded with 0; None has none."""
    if tokens is None or tokens.ndim == 1:
        return 0 if tokens is None else len(tokens)
    return int((tokens[:num_passages] > 0).sum(axis=1).max(initial=0))
