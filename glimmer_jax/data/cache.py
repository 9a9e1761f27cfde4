"""Writes seqio's task cache without Beam, for files that take minutes to read, such as T-REx.

The cache holds examples before an answer is drawn and before text is tokenised, so it serves any
vocabulary and lengths. The format is that of seqio's own `seqio_cache_tasks`. Beside seqio's files,
COMPLETED holds what the cache was written from, so that a task that changed since is noticed.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf
from etils import epath

from glimmer_jax.data.retrieved_tasks import RetrievedFiles
from glimmer_jax.storage.folder import open_folder, read_file

SPLITS = ("train", "validation")
COMPLETED = "COMPLETED"
WRITER = "glimmer_jax"  # in the info file of a split, whose other fields are seqio's


def write(
    task_name: str,
    cache_dir: str | Path,
    splits: Sequence[str] = SPLITS,
    num_shards: int = 16,
    polling: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, int]:
    """Caches the splits of a task; returns the number of examples of each split.

    Training examples are shuffled once over all shards. When reading, seqio shuffles the order of
    shards and fills a shuffle buffer.

    Args:
      task_name: registered with seqio.
      cache_dir: gets a folder for the task.
      splits: the splits to cache; those that the task does not have are skipped.
      num_shards: files per split.
      polling: is given the examples, and may stop between two of them (`STOP.polling`).

    Raises:
      ValueError: the task does not support caching or is already cached, or a data file is missing
        or invalid.
    """
    task = seqio.TaskRegistry.get(task_name)
    if not task.supports_caching:
        raise ValueError(
            f"{task_name} does not support caching: its examples are generated when they are read. "
            "Leave it out."
        )
    folder = folder_of(task_name, cache_dir)
    if is_complete(task_name, cache_dir):
        raise ValueError(
            f"{folder} already holds a complete cache of {task_name}. Remove it to rebuild the cache."
        )
    folder.mkdir(parents=True, exist_ok=True)
    counts, sources = {}, {}
    for split in task.splits:
        if split in splits:
            # Before it is read: what replaces it meanwhile is not what was cached.
            sources[split] = _source(task, split)
            counts[split] = _write_split(task, split, folder, num_shards, polling)
    # seqio asks only whether this file exists.
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    table = {"bytes": sizes, "sources": sources}
    (folder / COMPLETED).write_text(json.dumps(table, indent=2) + "\n")
    return counts


def check(task: seqio.Task, folder: Any = None, splits: Sequence[str] = ()) -> None:
    """Compares a cache with its table, and what it was written from with the task of today.

    seqio reads what is there. A cache that seqio's own tool wrote has no table.

    Args:
      task: from seqio's registry.
      folder: of the task's cache; None for the one that seqio finds.
      splits: the cache must have them, and only their origin is compared; none given: that of all.

    Raises:
      ValueError: there is no cache or it lacks a split, files are missing or cut, the table is damaged,
        or the retrieved files or MIN_BLEU_SCORE are not those that it was written from.
      StorageError: the table cannot be read.
    """
    folder = folder or task.cache_dir
    if folder is None:
        raise ValueError(
            f"USE_CACHED_TASKS: there is no complete cache of {task.name} in the folders of "
            "--seqio_additional_cache_dirs. Write it with --run_mode=cache, or set "
            "USE_CACHED_TASKS=False."
        )
    folder = epath.Path(folder)
    for split in splits:
        if not epath.Path(seqio.utils.get_cached_info_path(str(folder), split)).exists():
            raise ValueError(
                f"USE_CACHED_TASKS: {folder} has no {split} examples; --run_mode=cache writes "
                f"{' and '.join(SPLITS)}. Set USE_CACHED_TASKS=False."
            )
    again = f"Remove {folder} and run --run_mode=cache again."
    data = read_file(open_folder(folder), COMPLETED)
    if not data and not _is_ours(folder):
        return
    try:
        table = json.loads(data or b"")
        sizes, sources = dict(table["bytes"]), dict(table.get("sources", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"The cache of {task.name} is damaged: {folder / COMPLETED} holds no table of sizes. {again}"
        ) from None
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().length if path.exists() else 0
        if found != size:
            raise ValueError(
                f"The cache of {task.name} is damaged: {path} has {found} bytes instead of {size}. "
                f"{again}"
            )
    for split in splits or sources:
        source = sources.get(split)
        for name, now in _source(task, split).items():
            before = source.get(name) if isinstance(source, dict) else None
            if None not in (before, now) and before != now:
                raise ValueError(
                    f"The cache of {task.name} in {folder} was written from other examples of {split}: "
                    f"{name} was {before} and is {now}. {again}"
                )


def _source(task: seqio.Task, split: str) -> dict[str, Any]:
    """What the cached examples of a split depend on, as far as it is known."""
    return task.source.describe(split) if isinstance(task.source, RetrievedFiles) else {}


def _is_ours(folder: epath.Path) -> bool:
    """Whether this module wrote the cache, so that it has a table of sizes."""
    files = [path.name for path in folder.glob("info.*.json")]
    return any(WRITER.encode() in (read_file(open_folder(folder), file) or b"") for file in files)


def is_complete(task_name: str, cache_dir: str | Path) -> bool:
    """Whether the task's cache is complete."""
    return (folder_of(task_name, cache_dir) / COMPLETED).exists()


def folder_of(task_name: str, cache_dir: str | Path) -> Path:
    """The folder of a task's cache."""
    return Path(cache_dir) / seqio.get_task_dir_from_name(task_name)


def _write_split(
    task: seqio.Task,
    split: str,
    folder: Path,
    num_shards: int,
    polling: Callable[[Iterable[Any]], Iterable[Any]],
) -> int:
    ds = task.preprocess_precache(
        task.source.get_dataset(split, shuffle=split == "train", seed=0), seed=0
    )
    prefix = seqio.utils.get_cached_tfrecord_prefix(str(folder), split)
    count = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(tf.io.TFRecordWriter(f"{prefix}-{n:05d}-of-{num_shards:05d}"))
            for n in range(num_shards)
        ]
        for example in polling(ds.as_numpy_iterator()):
            # A rerun must write the same bytes.
            record = seqio.dict_to_tfexample(example).SerializeToString(deterministic=True)
            writers[count % num_shards].write(record)
            count += 1
    features = {
        name: {"shape": list(spec.shape), "dtype": spec.dtype.name}
        for name, spec in ds.element_spec.items()
    }
    info = {"num_shards": num_shards, "features": features, "seqio_version": seqio.__version__}
    info["written_by"] = WRITER
    _dump(seqio.utils.get_cached_info_path(str(folder), split), info)
    _dump(seqio.utils.get_cached_stats_path(str(folder), split), {"examples": count})
    return count


def _dump(path: str, value: dict) -> None:
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
