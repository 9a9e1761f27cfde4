"""BM25 over a passages folder: a job that gives every question of a task file its K passages.

Title and text are indexed. Training questions are answered from passages of the training split
alone, where the corpus has splits: passages of held-out modules must not be trained on, not even as
wrong ones. `tune` prints recall for a grid of settings on dev questions; the defaults come from it.
"""

import dataclasses
import functools
import glob
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from glimmer_jax.json_lines import write_json_lines
from glimmer_jax.kilt import is_gold, provenance, read_examples
from glimmer_jax.passages import Passages

_WORD = re.compile(r"[^\W_]+")
_NAME = re.compile(r"[^\W\d]\w*(?:\.\w+)+|\w*_\w+")
_BATCH = 512


@dataclasses.dataclass(frozen=True)
class Bm25Config:
    """Settings of BM25 (Lucene's form).

    Attributes:
      k1: how soon further occurrences of a word stop to count.
      b: how much long passages are held back, from 0 to 1.
      title_weight: times the title is indexed.
      stem: language of a Snowball stemmer (needs PyStemmer), or None.
    """

    k1: float = 0.2
    b: float = 0.3
    title_weight: int = 1
    stem: str | None = None

    def __post_init__(self) -> None:
        if self.k1 <= 0:
            raise ValueError(f"k1 must be above 0, got {self.k1}.")
        if not 0 <= self.b <= 1:
            raise ValueError(f"b must be from 0 to 1, got {self.b}.")
        if self.title_weight < 0:
            raise ValueError(f"title_weight must be 0 or more, got {self.title_weight}.")


def words(text: str) -> list[str]:
    """Lower-case words; a qualified name is there whole as well as in parts."""
    lower = text.lower()
    return _WORD.findall(lower) + _NAME.findall(lower)


@functools.lru_cache(maxsize=4)
def _stemmer(language: str) -> Callable[[list[str]], list[str]]:
    try:
        import Stemmer
    except ImportError:
        raise ValueError(
            f"stem={language!r} needs PyStemmer. Install it (pip install PyStemmer) or set stem to "
            "None."
        ) from None
    found: Callable[[list[str]], list[str]] = Stemmer.Stemmer(language).stemWords
    return found


class Bm25:
    """An index of records `{"id", "title", "text", …}`."""

    def __init__(self, records: Iterable[dict[str, Any]], config: Bm25Config = Bm25Config()):
        self.records = list(records)
        self.config = config
        if not self.records:
            raise ValueError("No passage to index. Check the passages folder and its splits.")
        corpus = [
            self._tokens(record["title"]) * config.title_weight + self._tokens(record["text"])
            for record in self.records
        ]
        self._index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene", backend="numpy")
        self._index.index(corpus, show_progress=False)

    def _tokens(self, text: str) -> list[str]:
        found = words(text)
        return found if self.config.stem is None else _stemmer(self.config.stem)(found)

    def search(self, questions: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
        """(row of `records`, score) of at most `k` passages a question, best first.

        Passages that share no word with the question are left out. Of equal scores the earlier row
        comes first, so that results are the same everywhere.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}.")
        found: list[list[tuple[int, float]]] = []
        for question in questions:
            known = [w for w in self._tokens(question) if w in self._index.vocab_dict]
            if not known:
                found.append([])
                continue
            scores = self._index.get_scores(known)
            # A stable choice needs every passage that ties with the last one.
            edge = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
            rows = np.flatnonzero(scores >= max(edge, np.finfo(np.float32).tiny))
            best = rows[np.argsort(-scores[rows], kind="stable")[:k]]
            found.append([(int(row), float(scores[row])) for row in best])
        return found


def retrieve_files(
    passages_dir: str | Path,
    question_glob: str,
    output_dir: str | Path,
    k: int,
    config: Bm25Config = Bm25Config(),
    train_split: str = "train",
) -> dict[str, dict[str, float]]:
    """Retrieves for every task file, writes it with `retrieved` into `output_dir`, prints recall.

    Args:
      passages_dir: a passages folder; its records name page, chunk and perhaps split.
      question_glob: pattern of task files, `<task>-<split>.jsonl`.
      output_dir: gets files of the same names.
      k: passages a question.
      config: settings of the index.
      train_split: files of this split see passages of this split only, where passages have one.

    Returns:
      For each file, `questions`, and `recall_at_1`, `_5` and `_k`: the share of the questions with
      provenance that have a gold passage so far up.

    Raises:
      ValueError: no file matches, the output would replace its input, or a file is malformed.
    """
    files = sorted(glob.glob(question_glob))
    if not files:
        raise ValueError(f"No file matches {question_glob!r}. Check the pattern of question files.")
    for file in files:
        if Path(file).resolve().parent == Path(output_dir).resolve():
            raise ValueError(f"{output_dir} holds the questions themselves. Write elsewhere.")
    records = list(Passages.open(passages_dir).records())
    indexes: dict[bool, Bm25] = {}
    report = {}
    for file in files:
        # Read whole before the work starts: a bad line must not surface after an hour.
        examples = list(read_examples(file))
        training = Path(file).stem.endswith(f"-{train_split}")
        if training not in indexes:
            seen = [
                r for r in records if not training or r.get("split", train_split) == train_split
            ]
            indexes[training] = Bm25(seen, config)
        print(f"{file}: {len(examples)} questions, {len(indexes[training].records)} passages")
        found = _with_progress(indexes[training], examples, k)
        write_json_lines(Path(output_dir) / Path(file).name, found)
        report[Path(file).stem] = recall(found, sorted({1, 5, 8, k} & set(range(1, k + 1))))
    print(format_report(report))
    return report


def _with_progress(index: Bm25, examples: list[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    begun = shown = time.monotonic()
    for start in range(0, len(examples), _BATCH):
        made.extend(retrieve(index, examples[start : start + _BATCH], k))
        now = time.monotonic()
        if now - shown > 5 or len(made) == len(examples):
            rate = len(made) / max(now - begun, 1e-6)
            left = (len(examples) - len(made)) / rate
            print(f"  {len(made)}/{len(examples)}, {rate:.0f} questions/s, {left:.0f} s left")
            sys.stdout.flush()
            shown = now
    return made


def retrieve(index: Bm25, examples: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """Copies of the examples with `retrieved`: `{"id", "score", "gold"}`, best first."""
    made = []
    results = index.search([example["input"] for example in examples], k)
    for example, result in zip(examples, results, strict=True):
        where = provenance(example)
        retrieved = [
            {
                "id": index.records[row]["id"],
                "score": round(score, 4),
                "gold": is_gold(index.records[row], where),
            }
            for row, score in result
        ]
        made.append({**example, "retrieved": retrieved})
    return made


def recall(examples: Sequence[dict[str, Any]], at: Sequence[int]) -> dict[str, float]:
    """`recall_at_N` over examples with provenance, and their number `questions`."""
    asked = [example for example in examples if provenance(example)]
    found: dict[str, float] = {"questions": len(asked)}
    for n in at:
        hits = sum(any(one["gold"] for one in example["retrieved"][:n]) for example in asked)
        found[f"recall_at_{n}"] = hits / max(len(asked), 1)
    return found


def format_report(report: dict[str, dict[str, float]]) -> str:
    """The numbers as a table, a row for each file."""
    columns = list(dict.fromkeys(name for row in report.values() for name in row))
    width = max(len(name) for name in report)
    lines = [" " * width + "".join(f"  {name.replace('recall_at_', 'R@'):>9}" for name in columns)]
    for name, row in report.items():
        cells = (f"  {row[c]:9.3f}" if c != "questions" else f"  {int(row[c]):9d}" for c in columns)
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def tune(
    passages_dir: str | Path,
    question_glob: str,
    k: int = 8,
    k1: Sequence[float] = (0.1, 0.2, 0.4, 0.9, 1.2),
    b: Sequence[float] = (0.2, 0.3, 0.4, 0.6, 0.75),
    title_weight: Sequence[int] = (1, 2),
    stem: Sequence[str | None] = (None,),
) -> Bm25Config:
    """Prints mean recall over the files for a grid of settings; returns the best at 1.

    Give dev files only: settings chosen on test questions would flatter the retriever.
    """
    files = sorted(glob.glob(question_glob))
    if not files:
        raise ValueError(f"No file matches {question_glob!r}. Check the pattern of question files.")
    examples = {Path(file).stem: list(read_examples(file)) for file in files}
    records = list(Passages.open(passages_dir).records())
    rows: dict[str, dict[str, float]] = {}
    best: tuple[float, Bm25Config] | None = None
    for values in itertools.product(k1, b, title_weight, stem):
        config = Bm25Config(*values)
        index = Bm25(records, config)
        each = [recall(retrieve(index, some, k), (1, 5, k)) for some in examples.values()]
        name = f"k1={config.k1} b={config.b} title={config.title_weight} stem={config.stem}"
        rows[name] = {key: float(np.mean([row[key] for row in each])) for key in each[0]}
        if best is None or rows[name]["recall_at_1"] > best[0]:
            best = rows[name]["recall_at_1"], config
    print(format_report(rows))
    assert best is not None
    return best[1]
