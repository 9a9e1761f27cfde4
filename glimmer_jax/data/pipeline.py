"""Training and evaluation batches from seqio: one deterministic stream, resumable at any step.

Every process reads the same global stream of questions and passage ids, keeps its own rows of each
batch, and fetches passages for these rows only. Results therefore do not depend on the number of
processes. The step determines the position in the stream: a restarted run skips the batches of
earlier steps.
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
    """Imports a module that registers tasks, for example `tasks.pydocs`. None imports nothing.

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
            f"MIXTURE_OR_TASK_MODULE: there is no module {module!r}. Set it to a Python module that "
            "registers tasks, such as 'tasks.pydocs'."
        ) from None


def find_mixture_or_task(name: str) -> Any:
    """The registered mixture or task.

    Raises:
      ValueError: the name is not registered.
    """
    known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    if name not in known:
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME: no mixture or task {name!r} is registered; registered are "
            f"{', '.join(known) or 'none'}. Check MIXTURE_OR_TASK_NAME and MIXTURE_OR_TASK_MODULE."
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
    """Yields this process's rows of every batch, starting at `start_step`.

    Args:
      mixture_or_task_name: registered with seqio.
      split: train, validation or test.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      batch_size: rows of a batch over all processes.
      seed: of shuffling, mixing and drawing answers.
      start_step: number of batches to skip at the beginning.
      passages: the folder with the tokens of `passage_ids`; None leaves them to a memory lookup.
      repeat: True shuffles and never ends. False is one pass in order, whose last batch is padded
        with empty rows (all padding, loss weight 0).
      use_cached: read seqio's cache of the task.
      own_rows: the rows of each batch to keep (`partitioning.own_rows`); None keeps all.

    Raises:
      ValueError: the name is unknown, the lengths or the batch size are invalid, or a data file is
        invalid.
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
    """The batch padded with empty rows to `batch_size`: 0, and `NO_PASSAGE` for passage ids."""
    filled = {}
    for name, x in batch.items():
        value = NO_PASSAGE if name == "passage_ids" else 0
        missing = [(0, batch_size - len(x)), *[(0, 0)] * (x.ndim - 1)]
        filled[name] = np.pad(x, missing, constant_values=value)
    return filled


def attach(batch: Batch, passages: Passages | None, length: int) -> Batch:
    """Adds int32 `passage_tokens [B, K, P]`; `passage_ids [B, K]` are kept for reports."""
    if passages is None or "passage_ids" not in batch:
        return batch
    rows = passages.rows(batch["passage_ids"])
    return {**batch, "passage_tokens": passages.tokens(rows, length)}


def check_vocabulary(mixture_or_task_name: str, vocabulary: Vocabulary) -> None:
    """Raises ValueError for a task with another vocabulary than that of model and passages."""
    for task in seqio.get_subtasks(find_mixture_or_task(mixture_or_task_name)):
        for feature in ("inputs", "targets"):
            registered = task.output_features[feature].vocabulary
            if not _same_vocabulary(registered, vocabulary.seqio()):
                raise ValueError(
                    f"VOCABULARY: model and passages have {vocabulary.path}, but the {feature} of "
                    f"{task.name} have {registered}. Register the task with that vocabulary, or set "
                    "VOCABULARY to the task's."
                )


def _same_vocabulary(a: Any, b: Any) -> bool:
    """Whether two of seqio's vocabularies have the same ids; seqio itself compares paths."""
    if not all(isinstance(x, seqio.SentencePieceVocabulary) for x in (a, b)):
        return bool(a == b)
    return bool(a.extra_ids == b.extra_ids and a.sp_model == b.sp_model)


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
    """Compares every task and its first examples with the settings, before anything is compiled.

    Truncated texts are counted. Outside of the training split they are logged as a warning, because
    evaluation on truncated questions or answers is wrong.

    Args:
      mixture_or_task_name: registered with seqio.
      split: train, validation or test.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      vocabulary: that of model and passages.
      has_passages: whether there is a passages folder or a memory.
      use_cached: read seqio's cache of the tasks.
      examples: number of examples of each task to check; None for all.
      max_cut: maximum share, from 0 to 1, of truncated questions and of truncated answers.

    Returns:
      Counts over all tasks: `examples`, and the number of them with a truncated question
      (`questions_cut`), a truncated answer (`answers_cut`), a truncated passage among those that the
      example itself holds (`passages_cut`), and without a gold passage (`without_gold`).
      `Passages.warn_of_cuts` checks the passages of a folder.

    Raises:
      ValueError: a task has another vocabulary, it names passages by id but there is no folder or
        memory, no example has an answer, no example has K passages, or more than `max_cut` of the
        questions or answers are longer than Q or T.
    """
    num_passages = check_lengths(lengths).passages
    counts = dict.fromkeys(
        ("examples", "questions_cut", "answers_cut", "passages_cut", "without_gold"), 0
    )
    check_vocabulary(mixture_or_task_name, vocabulary)
    for task in seqio.get_subtasks(find_mixture_or_task(mixture_or_task_name)):
        if "passage_ids" in task.output_features and not has_passages:
            raise ValueError(
                f"PASSAGES_DIR and MEMORY_DIR are not set, but the examples of {task.name} name their "
                "passages by id. Set PASSAGES_DIR to the folder that they were retrieved from, or "
                "MEMORY_DIR to its memory."
            )
        if split not in task.splits:
            raise ValueError(
                f"MIXTURE_OR_TASK_NAME: {task.name} has no {split} examples, only "
                f"{', '.join(task.splits)}. Leave it out of the mixture, or choose another split."
            )
        ds = task.get_dataset(None, split, use_cached, shuffle=False, num_epochs=1)
        max_passages = seen = answered = 0
        num_tokens: dict[str, list[int]] = {"inputs": [], "targets": [], "passages": []}
        for example in ds.take(-1 if examples is None else examples).as_numpy_iterator():
            seen += 1
            for key, values in num_tokens.items():
                values.append(_longest(example.get(key), num_passages))
            retrieved = example.get("passage_ids", example.get("passages"))
            max_passages = max(max_passages, len(retrieved))
            answered += bool(np.any(example["targets"] > vocabulary.eos_id))
            counts["without_gold"] += not np.any(example.get("gold_passages", 1))
        if not answered:
            raise ValueError(
                f"MIXTURE_OR_TASK_NAME: no {split} example of {task.name} has an answer (KILT does not "
                "publish those of its test files). Choose another split, or use --run_mode=infer."
            )
        if max_passages < num_passages:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS has K={num_passages} passages, but the {split} examples of "
                f"{task.name} have at most {max_passages}. Retrieve {num_passages}, or lower K."
            )
        counts["examples"] += seen
        for name, key in (
            ("questions", "inputs"),
            ("answers", "targets"),
            ("passages", "passages"),
        ):
            length = lengths[key] if key != "passages" else lengths[key][1]
            count = sum(value > length for value in num_tokens[key])
            counts[f"{name}_cut"] += count
            # Passages have no limit: one of many is often too long, and rarely the one that
            # answers.
            if key != "passages" and count > max_cut * seen:
                raise ValueError(
                    f"TASK_FEATURE_LENGTHS[{key!r}]={length}, but {count} of {seen} {name} of "
                    f"{task.name} ({split}) have more tokens, the longest {max(num_tokens[key])}. Raise "
                    "it."
                )
            if count and split != "train":
                logger.warning(
                    "TASK_FEATURE_LENGTHS[%r]: %d of %d %s of %s (%s) have more than %d tokens and are "
                    "truncated; the longest has %d.",
                    key, count, seen, name, task.name, split, length, max(num_tokens[key]),
                )  # fmt: skip
    return counts


def _longest(tokens: np.ndarray | None, num_passages: int) -> int:
    """Number of tokens of `[n]`, or of the longest of the first passages `[K, P]`; 0 for None."""
    if tokens is None or tokens.ndim == 1:
        return 0 if tokens is None else len(tokens)
    return int((tokens[:num_passages] > 0).sum(axis=1).max(initial=0))
