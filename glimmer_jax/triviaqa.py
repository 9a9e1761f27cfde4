"""The questions of TriviaQA (arXiv 1705.03551), which KILT's files name by id alone.

From TriviaQA's own archives, `triviaqa-rc` (qa/wikipedia-*.json) or `triviaqa-unfiltered`
(unfiltered-web-*.json), a JSON object each:

    {"Data": [{"QuestionId": "tc_2", "Question": "Which river runs through Paris?", …}, …], …}

or from the hub's Parquet files of `trivia_qa`, with columns `question_id` and `question`.
"""

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from glimmer_jax.parquet import read_rows


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
