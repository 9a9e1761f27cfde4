"""The questions of a retrieval job, from task files of ours or as KILT publishes them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glimmer_jax import kilt_files
from glimmer_jax.kilt import read_examples, shortened


def read_task(
    name: str,
    paths: Sequence[Path],
    questions: Mapping[str, str] | None = None,
    words: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Examples of one task and split, one after the other.

    Args:
      name: `<task>-<split>.jsonl`, and
      paths: its files, both of `kilt_files.find`.
      questions: by id, for files that hold ids alone (`triviaqa.read_questions`).
      words: kept of long entity-linking and dialogue inputs (`kilt.shortened`); None for all.

    Raises ValueError where a line is malformed.
    """
    task = kilt_files.TASKS.get(name.rsplit("-", 1)[0])
    dialogue = task is not None and task.kind == kilt_files.DIALOGUE
    for path in paths:
        for example in read_examples(path, questions=questions):
            if words is not None:
                example = {**example, "input": shortened(example["input"], words, dialogue)}
            yield example


def read_files(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Examples of every file of a pattern, by the name that retrieval gives it.

    Raises ValueError where there is no file, or a line is malformed.
    """
    files = kilt_files.find(pattern)
    return {name: list(read_task(name, paths)) for name, paths in files.items()}
