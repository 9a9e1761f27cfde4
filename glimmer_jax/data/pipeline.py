"""Training and evaluation batches from seqio: one deterministic stream, resumable at any step.

Every process reads the same global stream of questions and passage ids, keeps its own rows of each
batch, and fetches passages for these rows only. Results therefore do not depend on the number of
processes. The order of training examples is a function of the step (`data.stream`): a restarted run
starts there without reading the batches of earlier steps.
"""

import importlib
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seqio

from glimmer_jax.axes import check_lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.data.features import NO_PASSAGE
from glimmer_jax.data.stream import training_batches
from glimmer_jax.vocabulary import Vocabulary

Batch = dict[str, Any]
_PROJECT = Path(__file__).resolve().parents[1]
# Where no line of a user's module is.
_LIBRARIES = (
    _PROJECT,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")),
)


def import_tasks(module: str | None) -> None:
    """Imports a module that registers tasks, for example `tasks.pydocs`. None imports nothing.

    Raises:
      ValueError: there is no such module, or it fails; with its file and line.
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
    except Exception as error:  # whatever the user's module raises
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError | OSError) and _is_below(frames[-1].filename, _PROJECT):
            raise
        place = module
        if isinstance(error, SyntaxError):
            place = f"{error.filename}:{error.lineno}"
        elif own := [frame for frame in frames if not _is_below(frame.filename, *_LIBRARIES)]:
            place = f"{own[-1].filename}:{own[-1].lineno}"
        raise ValueError(
            f"MIXTURE_OR_TASK_MODULE: {module} cannot be imported, {type(error).__name__} in {place}: "
            f"{error}. Correct that line."
        ) from error


def _is_below(file: str, *folders: Path) -> bool:
    return file.startswith("<") or any(Path(file).is_relative_to(folder) for folder in folders)


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
    use_cached: bool = False,
    own_rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields this process's rows of every training batch, without end, starting at `start_step`.

    Args:
      mixture_or_task_name: registered with seqio.
      split: train, validation or test.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      batch_size: rows of a batch over all processes.
      seed: of shuffling, mixing and drawing answers.
      start_step: number of batches before the first.
      passages: the folder with the tokens of `passage_ids`; None leaves them to a memory lookup.
      use_cached: read seqio's cache of the task.
      own_rows: the rows of each batch to keep (`partitioning.own_rows`); None keeps all.

    Raises:
      ValueError: the name is unknown, the lengths or the batch size are invalid, or a data file is
        invalid.
    """
    mixture_or_task = find_mixture_or_task(mixture_or_task_name)
    passage_length = check_lengths(lengths).passage
    if batch_size < 1:
        raise ValueError(f"BATCH_SIZE must be at least 1, got {batch_size}.")
    stream = training_batches(
        mixture_or_task,
        split,
        lengths,
        batch_size,
        seed=seed,
        start_step=start_step,
        use_cached=use_cached,
    )
    own = slice(None) if own_rows is None else own_rows
    return (
        attach({name: x[own] for name, x in batch.items()}, passages, passage_length)
        for batch in stream
    )


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
    """Raises ValueError for a task with another vocabulary than that of model and passages.

    The same file at two paths is one vocabulary; seqio itself compares paths.
    """
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
    """Whether two of seqio's vocabularies have the same ids."""
    if not all(isinstance(x, seqio.SentencePieceVocabulary) for x in (a, b)):
        return bool(a == b)
    return bool(a.extra_ids == b.extra_ids and a.sp_model == b.sp_model)
