"""seqio's cache of tasks, written without Beam: for files that take minutes to read, T-REx above all.

    python -m glimmer_jax.data.cache kilt_glimmer --module=tasks.kilt --data_dir=DIR --cache_dir=CACHE

Training and evaluation read it with `--seqio_additional_cache_dirs=CACHE --gin.USE_CACHED_TASKS=True`. It
holds what comes before an answer is drawn and text is tokenised, so it serves any vocabulary and
lengths. Started again after a kill, it goes on with the first task that is not complete. seqio's own
`seqio_cache_tasks` writes the same.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import seqio
import tensorflow as tf

from glimmer_jax.data import pipeline, retrieved_tasks

SPLITS = ("train", "validation")
COMPLETED = "COMPLETED"


def write(
    task_name: str, cache_dir: str | Path, splits: Sequence[str] = SPLITS, num_shards: int = 16
) -> dict[str, int]:
    """Caches those splits that a task has; returns their numbers of examples.

    Training examples are shuffled once over all shards; seqio shuffles shards and neighbours.

    Raises:
      ValueError: the task allows no cache or has one already, or a file is missing or at fault.
    """
    task = seqio.TaskRegistry.get(task_name)
    if not task.supports_caching:
        raise ValueError(f"{task_name} allows no cache: its examples are made when they are read.")
    folder = _folder(task_name, cache_dir)
    if is_complete(task_name, cache_dir):
        raise ValueError(f"{folder} holds a cache of {task_name} already. Remove it to write anew.")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {
        split: _write_split(task, split, folder, num_shards)
        for split in task.splits
        if split in splits
    }
    (folder / COMPLETED).write_text("")
    return counts


def is_complete(task_name: str, cache_dir: str | Path) -> bool:
    """Whether the task's cache was written to its end."""
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
    _dump(seqio.utils.get_cached_info_path(str(folder), split), info)
    _dump(seqio.utils.get_cached_stats_path(str(folder), split), {"examples": count})
    return count


def _dump(path: str, value: dict) -> None:
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of a task or mixture")
    parser.add_argument("--module", required=True, help="that registers it, such as tasks.kilt")
    parser.add_argument("--data_dir", required=True, help="of retrieved files")
    parser.add_argument("--cache_dir", required=True)
    parser.add_argument("--min_bleu_score", type=float, help="as MIN_BLEU_SCORE of training")
    args = parser.parse_args(argv)
    retrieved_tasks.configure(args.data_dir, args.min_bleu_score)
    pipeline.import_tasks(args.module)
    for task in seqio.get_subtasks(pipeline.find_mixture_or_task(args.name)):
        if is_complete(task.name, args.cache_dir):
            print(f"{task.name}: is there already")
            continue
        counts = write(task.name, args.cache_dir)
        print(f"{task.name}: " + ", ".join(f"{split} {n}" for split, n in counts.items()))


if __name__ == "__main__":
    main()
