"""KILT's eleven tasks (arXiv 2009.02252): names, sizes and questions of their published files.

    nq-train-kilt.jsonl   nq-dev-kilt.jsonl   nq-test_without_answers-kilt.jsonl
    triviaqa-train_id-kilt.jsonl              triviaqa-test_id_without_answers-kilt.jsonl
    nq/train-00000-of-00001.parquet           the same lines, as on the Hugging Face hub

Each file belongs to one task and split. Retrieval writes it as `nq-train.jsonl`, ….

KILT's TriviaQA files name questions by id. The questions themselves (arXiv 1705.03551) come from
TriviaQA's own archives, `triviaqa-rc` (qa/wikipedia-*.json) or `triviaqa-unfiltered`
(unfiltered-web-*.json), one JSON object each,

    {"Data": [{"QuestionId": "tc_2", "Question": "Which river runs through Paris?", …}, …], …}

or from the hub's Parquet files of `trivia_qa`, with columns `question_id` and `question`.
"""

import dataclasses
import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glimmer_jax.kilt.examples import read_examples
from glimmer_jax.storage.json_lines import regular_file
from glimmer_jax.storage.parquet import read_rows

logger = logging.getLogger(__name__)

LINKING, DIALOGUE = "entity linking", "dialogue"
ENTITY_START, ENTITY_END = "[START_ENT]", "[END_ENT]"

_JSONL = re.compile(r"(.+)-(train|dev|test)(?:_id)?(?:_without_answers)?(?:-kilt)?\.jsonl")
_MISNAMED = re.compile(r"(.+?)[-_.](train|validation|valid|val|dev|test)\.jsonl")
_PARQUET = re.compile(r"(train|validation|test)-(\d{5})-of-(\d{5})\.parquet")
# The hub's name of the task whose questions KILT's files lack.
_HUB_NAMES = {"triviaqa_support_only": "triviaqa"}


@dataclasses.dataclass(frozen=True)
class KiltTask:
    """A task as published.

    Attributes:
      kind: of question.
      sizes: lines of the file of each of seqio's splits; a missing split has no file.
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
    """`<task>-<train|dev|test>.jsonl` for a published file; other JSON Lines keep their name.

    Raises ValueError for a Parquet file whose folder and name are not those of the hub.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        name = path.name.removesuffix(".gz")
        match = _JSONL.fullmatch(name)
        return f"{match[1]}-{match[2]}.jsonl" if match else name
    task = _HUB_NAMES.get(path.parent.name, path.parent.name)
    shard = _PARQUET.fullmatch(path.name)
    if shard is None or task not in TASKS:
        raise ValueError(
            f"{path}: task and split are unknown. Rename folder and file as on the hub, such as "
            "nq/train-00000-of-00001.parquet."
        )
    return f"{task}-{'dev' if shard[1] == 'validation' else shard[1]}.jsonl"


def find_files(pattern: str) -> dict[str, list[Path]]:
    """`{task_file: files}` of the files that match, in order; only Parquet comes in several files.

    Logs a warning for names without a split that tasks read.

    Raises ValueError where nothing matches, two files hold one split, or a shard is missing.
    """
    files: dict[str, list[Path]] = {}
    for path in map(Path, _matching(pattern)):
        if not path.is_dir():
            files.setdefault(task_file(regular_file(path)), []).append(path)
    if not files:
        raise ValueError(f"QUESTIONS: no file matches {pattern!r}. Check the pattern.")
    for name, paths in files.items():
        shards = [_PARQUET.fullmatch(path.name) for path in paths]
        count = int(shards[0][3]) if shards[0] else 1
        if len({path.parent for path in paths}) > 1 or (len(paths) > 1 and not all(shards)):
            raise ValueError(
                f"QUESTIONS: {paths[0]} and {paths[1]} are both {name}. Keep one of them, or narrow the "
                "pattern."
            )
        if len(paths) != count:
            raise ValueError(
                f"QUESTIONS: {name} has {count} Parquet files, found {len(paths)}, the first is "
                f"{paths[0]}. Copy all."
            )
        if not _JSONL.fullmatch(name):
            _warn_of_name(paths[0], name)
    return files


def _matching(pattern: str) -> list[str]:
    """Paths that match, in order. An existing path is itself, also with brackets in its name."""
    return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))


def _warn_of_name(path: Path, name: str) -> None:
    advice = ""
    if match := _MISNAMED.fullmatch(name):
        split = match[2] if match[2] in ("train", "test") else "dev"
        advice = f", for example to {match[1]}-{split}.jsonl"
    logger.warning(
        "QUESTIONS: %s is not named <task>-<train|dev|test>.jsonl, so no task reads it, and training "
        "questions may see passages of every split. Rename it%s.", path, advice,
    )  # fmt: skip


def read_questions(pattern: str) -> dict[str, str]:
    """TriviaQA's `{id: question}` of all files that match.

    Raises ValueError where no file matches, a file has another form, or an id has two questions.
    """
    paths = _matching(pattern)
    if not paths:
        raise ValueError(
            f"TRIVIAQA: no file matches {pattern!r}. Give TriviaQA's own files, such as "
            "'triviaqa-rc/qa/wikipedia-*.json'."
        )
    questions: dict[str, str] = {}
    for path in paths:
        for name, question in _id_and_question(Path(regular_file(path))):
            if questions.setdefault(name, question) != question:
                raise ValueError(
                    f"TRIVIAQA: {path} and an earlier file have different questions for {name!r}. "
                    "Narrow the pattern."
                )
    return questions


def _id_and_question(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        for row in read_rows(path, ("question_id", "question")):
            name, question = row["question_id"], row["question"]
            if not isinstance(name, str) or not isinstance(question, str):
                raise ValueError(
                    f"TRIVIAQA: {path}: expected strings in question_id and question, got {name!r:.80} "
                    f"and {question!r:.80}. Give a file of TriviaQA."
                )
            yield name, question
        return
    try:
        entries = json.loads(path.read_bytes())["Data"]
        pairs = [(entry["QuestionId"], entry["Question"]) for entry in entries]
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise TypeError("an id or a question is not a string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'TRIVIAQA: {path}: expected {{"Data": [{{"QuestionId", "Question"}}]}}, got '
            f"{type(error).__name__}: {error}. Give a file of TriviaQA's archives."
        ) from None
    yield from pairs


def read_task(
    name: str,
    paths: Sequence[Path],
    questions: Mapping[str, str] | None = None,
    words: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Examples of one task and split, in order.

    Args:
      name: `<task>-<split>.jsonl`, and
      paths: its files, both from `find_files`.
      questions: by id, for files that hold only ids (`read_questions`).
      words: most words of entity-linking and dialogue inputs (`shorten`); None keeps all.

    Raises ValueError for an invalid line, and for an id that two files have.
    """
    seen: set[str] = set()
    task = TASKS.get(name.rsplit("-", 1)[0])
    dialogue = task is not None and task.kind == DIALOGUE
    for path in paths:
        for example in read_examples(path, questions):
            if len(paths) > 1:
                if example["id"] in seen:
                    raise ValueError(
                        f"QUESTIONS: {path} repeats the id {example['id']!r:.80} of an earlier file of "
                        f"{name}. Was a file copied under two names? Narrow the pattern."
                    )
                seen.add(example["id"])
            if words is not None:
                example = {**example, "input": shorten(example["input"], words, dialogue)}
            yield example


def read_files(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Examples of the files that match, by `task_file`. Raises ValueError as `find_files`."""
    return {name: list(read_task(name, paths)) for name, paths in find_files(pattern).items()}


def shorten(question: str, words: int, dialogue: bool = False) -> str:
    """At most `words` words of an input: those around its marked mention, or a dialogue's last ones.

        "… rose in [START_ENT] Avon [END_ENT] in …" -> "in [START_ENT] Avon [END_ENT] in"

    Other questions are kept, because their beginning matters.
    """
    tokens = question.split()
    if len(tokens) <= words or not (dialogue or ENTITY_START in tokens):
        return question
    if dialogue:
        return " ".join(tokens[-words:])
    first = tokens.index(ENTITY_START)
    last = tokens.index(ENTITY_END, first) if ENTITY_END in tokens[first:] else first
    around = max(words - (last - first + 1), 0)
    # Words that one side does not need go to the other.
    left = min(first, max(around // 2, around - (len(tokens) - 1 - last)))
    return " ".join(tokens[first - left : last + 1 + around - left])
