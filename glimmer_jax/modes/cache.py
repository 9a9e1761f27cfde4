"""Mode `cache`: seqio's task caches, which shorten the start of training on large files."""

from glimmer_jax.modes import checks, outputs
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage import folder


def cache_tasks(
    mixture_or_task_name: str,
    mixture_or_task_module: str,
    data_dir: str,
    cache_dir: str,
    min_bleu_score: float | None = None,
) -> None:
    """Caches the train and validation examples of a task, or of a mixture's tasks.

    A rerun after a stop resumes at the first incomplete task.

    Args:
      mixture_or_task_name: registered with seqio.
      mixture_or_task_module: the module that registers it, such as `tasks.kilt`.
      data_dir: folder of the retrieved files.
      cache_dir: folder for the caches, on a local disk.
      min_bleu_score: of training answers, as in training; None is its default.

    Raises:
      ValueError: a task does not support caching, a data file is missing or invalid, another process is
        writing the caches, or a complete cache is not that of these files and settings.
    """
    checks.required(
        MIXTURE_OR_TASK_NAME=mixture_or_task_name, DATA_DIR=data_dir, CACHE_DIR=cache_dir
    )
    place = folder.local("CACHE_DIR", cache_dir)
    import seqio

    from glimmer_jax.data import cache, pipeline, retrieved_tasks

    retrieved_tasks.configure(data_dir, min_bleu_score)
    pipeline.import_tasks(mixture_or_task_module)
    tasks = seqio.get_subtasks(pipeline.find_mixture_or_task(mixture_or_task_name))
    place.mkdir(parents=True, exist_ok=True)
    with outputs.locked(str(place), in_place=True) as check_lock:
        for task in tasks:
            if cache.is_complete(task.name, place):
                cache.check(task, cache.folder_of(task.name, place))
                print(f"{task.name}: already cached")
                continue
            check_lock()
            counts = cache.write(task.name, place, polling=STOP.polling)
            print(f"{task.name}: " + ", ".join(f"{split} {n}" for split, n in counts.items()))
