"""KILT's eleven tasks (arXiv 2009.02252): the names and sizes of their published files.

    nq-train-kilt.jsonl   nq-dev-kilt.jsonl   nq-test_without_answers-kilt.jsonl
    triviaqa-train_id-kilt.jsonl              triviaqa-test_id_without_answers-kilt.jsonl
    nq/train-00000-of-00001.parquet           the same lines, as the Hugging Face hub keeps them

are all of one task and split, and are called `nq-train.jsonl`, … from retrieval on.

The questions of TriviaQA (arXiv 1705.03551), which KILT's files name by id alone.

From TriviaQA's own archives, `triviaqa-rc` (qa/wikipedia-*.json) or `triviaqa-unfiltered`
(unfiltered-web-*.json), a JSON object each:

    {"Data": [{"QuestionId": "tc_2", "Question": "Which river runs through Paris?", …}, …], …}

or from the hub's Parquet files of `trivia_qa`, with columns `question_id` and `question`.

The questions of a retrieval job, from task files of ours or as KILT publishes them.
"""

import dataclasses
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glimmer_jax.kilt.examples import read_examples, shortened
from glimmer_jax.storage.parquet import read_rows

LINKING, DIALOGUE = "entity linking", "dialogue"

_JSONL = re.compile(r"(.+)-(train|dev|test)(?:_id)?(?:_without_answers)?-kilt\.jsonl")
_PARQUET = re.compile(r"(train|validation|test)-(\d{5})-of-(\d{5})\.parquet")
# The hub's name of the task whose questions are not in KILT's files.
_HUB_NAMES = {"triviaqa_support_only": "triviaqa"}


@dataclasses.dataclass(frozen=True)
class KiltTask:
    """A task as published.

    Attributes:
      kind: what is asked.
      sizes: lines of the file of each of seqio's splits; there is none of a split that is left out.
    """

    kind: str
    sizes: Mapping[str, int]


def _task(kind: str, train: int | None, validation: int, test: int) -> KiltTask:
    sizes = {"train": train, "validation": validation, "test": test}
    return KiltTask(kind, {split: size for split, size in sizes.items() if size is not None})


TASKS = {
    "fever": _task("fact checking", 104_966, 10_444, 10_100),
    "aidayago2": _task(LINKING, 18_395, 4_784, 4_463),
    "wned": _task(LINKING, None, 3_396, 3_376),
    "cweb": _task(LINKING, None, 5_599, 5_543),
    "trex": _task("slot filling", 2_284_168, 5_000, 5_000),
    "structured_zeroshot": _task("slot filling", 147_909, 3_724, 4_966),
    "nq": _task("question answering", 87_372, 2_837, 1_444),
    "hotpotqa": _task("question answering", 88_869, 5_600, 5_569),
    "triviaqa": _task("question answering", 61_844, 5_359, 6_586),
    "eli5": _task("long answers", 272_634, 1_507, 600),
    "wow": _task(DIALOGUE, 63_734, 3_054, 2_944),
}


def task_file(path: str | Path) -> str:
    """`<task>-<train|dev|test>.jsonl` for a published file; any other JSON Lines keep their name.

    Raises ValueError for a Parquet file that does not lie and is not named as on the hub.
    """
    path = Path(path)
    if found := _JSONL.fullmatch(path.name):
        return f"{found[1]}-{found[2]}.jsonl"
    if path.suffix != ".parquet":
        return path.name
    task = _HUB_NAMES.get(path.parent.name, path.parent.name)
    shard = _PARQUET.fullmatch(path.name)
    if shard is None or task not in TASKS:
        raise ValueError(
            f"{path}: wanted the names of the hub, such as nq/train-00000-of-00001.parquet, to know "
            "task and split. Rename folder and file."
        )
    return f"{task}-{'dev' if shard[1] == 'validation' else shard[1]}.jsonl"


def find(pattern: str) -> dict[str, list[Path]]:
    """`{task_file: files}` of what matches a pattern, in order; only Parquet comes in several files.

    Raises ValueError where nothing matches, two files hold one split, or a part of one is missing.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(glob.glob(pattern)):
        if os.path.isfile(path):
            found.setdefault(task_file(path), []).append(Path(path))
    if not found:
        raise ValueError(f"No file matches {pattern!r}. Check the pattern of question files.")
    for name, paths in found.items():
        shards = [_PARQUET.fullmatch(path.name) for path in paths]
        wanted = int(shards[0][3]) if shards[0] else 1
        if len({path.parent for path in paths}) > 1 or (len(paths) > 1 and not all(shards)):
            raise ValueError(
                f"{paths[0]} and {paths[1]} are both {name}. Keep one of them, or narrow the pattern."
            )
        if len(paths) != wanted:
            raise ValueError(
                f"{name} comes in {wanted} Parquet files, and {len(paths)} of them are here, the first "
                f"is {paths[0]}. Copy all."
            )
    return found


def read_questions(pattern: str) -> dict[str, str]:
    """`{id: question}` of all files that match.

    Raises ValueError where no file matches, a file has another form, or an id has two questions.
    """
    files = sorted(glob.glob(pattern))
    if not files:
        raise ValueError(
            f"TRIVIAQA: no file matches {pattern!r}. Give TriviaQA's own files, such as "
            "'triviaqa-rc/qa/wikipedia-*.json'."
        )
    found: dict[str, str] = {}
    for file in files:
        for name, question in _pairs(Path(file)):
            if found.setdefault(name, question) != question:
                raise ValueError(f"{file}: {name!r} has another question in a file before it.")
    return found


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        for row in read_rows(path, ("question_id", "question")):
            yield row["question_id"], row["question"]
        return
    try:
        entries = json.loads(path.read_bytes())["Data"]
        yield from [(one["QuestionId"], one["Question"]) for one in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: wanted TriviaQA\'s {{"Data": [{{"QuestionId", "Question"}}]}}, got '
            f"{type(error).__name__}: {error}. Give a file of TriviaQA's archives."
        ) from None


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
    task = TASKS.get(name.rsplit("-", 1)[0])
    dialogue = task is not None and task.kind == DIALOGUE
    for path in paths:
        for example in read_examples(path, questions=questions):
            if words is not None:
                example = {**example, "input": shortened(example["input"], words, dialogue)}
            yield example


def read_files(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Examples of every file of a pattern, by the name that retrieval gives it.

    Raises ValueError where there is no file, or a line is malformed.
    """
    files = find(pattern)
    return {name: list(read_task(name, paths)) for name, paths in files.items()}
