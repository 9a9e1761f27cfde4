"""Writes seqio's task cache without Beam, for files that take minutes to read, such as T-REx.

    python -m glimmer_jax.data.cache kilt_glimmer --module=tasks.kilt --data_dir=DIR
    --cache_dir=CACHE

Training and evaluation read it with `--seqio_additional_cache_dirs=CACHE
--gin.USE_CACHED_TASKS=True`. The cache holds examples before an answer is drawn and before text is
tokenised, so it serves any vocabulary and lengths. A rerun after a kill resumes at the first
incomplete task. The format is that of seqio's own `seqio_cache_tasks`.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import seqio
import tensorflow as tf
from etils import epath

from glimmer_jax.data import pipeline, retrieved_tasks
from glimmer_jax.storage.folder import open_folder, read_file

SPLITS = ("train", "validation")
COMPLETED = "COMPLETED"
WRITER = "glimmer_jax"  # in the info file of a split, whose other fields are seqio's


def write(
    task_name: str, cache_dir: str | Path, splits: Sequence[str] = SPLITS, num_shards: int = 16
) -> dict[str, int]:
    """Caches the splits of a task; returns the number of examples of each split.

    Training examples are shuffled once over all shards. When reading, seqio shuffles the order of
    shards and fills a shuffle buffer.

    Args:
      task_name: registered with seqio.
      cache_dir: gets a folder for the task.
      splits: the splits to cache; those that the task does not have are skipped.
      num_shards: files per split.

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
    folder = _folder(task_name, cache_dir)
    if is_complete(task_name, cache_dir):
        raise ValueError(
            f"{folder} already holds a complete cache of {task_name}. Remove it to rebuild the cache."
        )
    folder.mkdir(parents=True, exist_ok=True)
    counts = {
        split: _write_split(task, split, folder, num_shards)
        for split in task.splits
        if split in splits
    }
    # seqio asks only whether this file exists.
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / COMPLETED).write_text(json.dumps({"bytes": sizes}, indent=2) + "\n")
    return counts


def check(task: seqio.Task) -> None:
    """Compares the task's cache with its table of sizes; seqio reads what is there.

    A cache that seqio's own tool wrote has no table.

    Raises:
      ValueError: files are missing or cut, or the table is damaged.
      StorageError: the table cannot be read.
    """
    folder = epath.Path(task.cache_dir)
    data = read_file(open_folder(folder), COMPLETED)
    sizes: dict[str, int] = {}
    if data or _is_ours(folder):
        try:
            sizes = dict(json.loads(data or b"")["bytes"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"The cache of {task.name} is damaged: {folder / COMPLETED} holds no table of sizes. "
                f"Remove {folder} and run python -m glimmer_jax.data.cache again."
            ) from None
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().length if path.exists() else 0
        if found != size:
            raise ValueError(
                f"The cache of {task.name} is damaged: {path} has {found} bytes instead of {size}. "
                f"Remove {folder} and run python -m glimmer_jax.data.cache again."
            )


def _is_ours(folder: epath.Path) -> bool:
    """Whether this module wrote the cache, so that it has a table of sizes."""
    files = [path.name for path in folder.glob("info.*.json")]
    return any(WRITER.encode() in (read_file(open_folder(folder), file) or b"") for file in files)


def is_complete(task_name: str, cache_dir: str | Path) -> bool:
    """Whether the task's cache is complete."""
    return (_folder(task_name, cache_dir) / COMPLETED).exists()


def _folder(task_name: str, cache_dir: str | Path) -> Path:
    return Path(cache_dir) / seqio.get_task_dir_from_name(task_name)


def _write_split(task: seqio.Task, split: str, folder: Path, num_shards: int) -> int:
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
        for example in ds.as_numpy_iterator():
            record = seqio.dict_to_tfexample(example).SerializeToString()
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


def main(argv: Sequence[str] | None = None) -> None:
    """Caches all incomplete tasks of a mixture; prints the number of examples of each split."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="a task or mixture")
    parser.add_argument(
        "--module", required=True, help="the module that registers it, such as tasks.kilt"
    )
    parser.add_argument("--data_dir", required=True, help="the folder of retrieved files")
    parser.add_argument("--cache_dir", required=True, help="the folder to write")
    parser.add_argument("--min_bleu_score", type=float, help="the MIN_BLEU_SCORE of training")
    args = parser.parse_args(argv)
    try:
        _cache_all(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _cache_all(args: argparse.Namespace) -> None:
    retrieved_tasks.configure(args.data_dir, args.min_bleu_score)
    pipeline.import_tasks(args.module)
    for task in seqio.get_subtasks(pipeline.find_mixture_or_task(args.name)):
        if is_complete(task.name, args.cache_dir):
            print(f"{task.name}: already cached")
            continue
        counts = write(task.name, args.cache_dir)
        print(f"{task.name}: " + ", ".join(f"{split} {n}" for split, n in counts.items()))


if __name__ == "__main__":
    main()
