"""Mode `retrieve`: every question of task files gets its passages, by BM25, GTR or both.

Training questions are answered from passages of the training split alone, where the corpus has splits:
passages of held-out modules must not be trained on, not even as wrong ones.
"""

import collections
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt import files
from glimmer_jax.kilt.files import read_questions, read_task
from glimmer_jax.metrics.retrieval import KS, RetrievalScores, format_report
from glimmer_jax.modes import checks
from glimmer_jax.retrieval import corpus_check
from glimmer_jax.retrieval import retriever as retrievers
from glimmer_jax.retrieval.bm25 import Bm25Config, Bm25Retriever
from glimmer_jax.retrieval.dense import DenseConfig, DenseRetriever
from glimmer_jax.retrieval.hybrid import HybridRetriever, check_weight
from glimmer_jax.retrieval.retriever import Retriever
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage.folder import in_bucket
from glimmer_jax.storage.json_lines import write_json_lines

# Files of this split see passages of this split alone, where passages have one.
TRAIN = "train"
RETRIEVERS = ("bm25", "dense", "hybrid")

Report = dict[str, dict[str, float]]


def retrieve(
    passages_dir: str,
    questions: str,
    data_dir: str,
    num_passages: int,
    retriever: str = "bm25",
    bm25: Bm25Config = Bm25Config(),
    dense: DenseConfig = DenseConfig(),
    dense_weight: float = 0.5,
    triviaqa: str | None = None,
    question_words: int | None = None,
) -> dict[str, Report]:
    """Writes each task file with `retrieved` into `data_dir`, and prints recall.

    With `dense` and `hybrid` the index is made first, or gone on with; a job that was stopped goes
    on there when the same command is given again.

    Args:
      passages_dir: written by mode `passages`.
      questions: pattern of task files, such as `data/questions/*.jsonl`, `kilt/*-kilt.jsonl` or the
        hub's `kilt_tasks/*/*.parquet`.
      data_dir: gets a `<task>-<split>.jsonl` of each (`kilt_files.task_file`), which tasks read, and
        beside it the note of `retrieval.origin`.
      num_passages: K, passages of a question.
      retriever: `bm25`, `dense` or `hybrid`.
      bm25: settings of BM25.
      dense: encoder and index of dense retrieval.
      dense_weight: of dense scores in `hybrid`, from 0 to 1.
      triviaqa: pattern of TriviaQA's own files, whose questions KILT's files name by id.
      question_words: words kept of long entity-linking and dialogue inputs, in the written files too;
        None for all.

    Returns:
      `{"passages": {file: recall of passages}, "pages": {file: KILT's scores of pages}}`; no pages
      where passages do not say theirs.

    Raises:
      ValueError: missing settings or files, bad lines, or an index of something else.
    """
    checks.required(PASSAGES_DIR=passages_dir, QUESTIONS=questions, DATA_DIR=data_dir)
    if num_passages < 1:
        raise ValueError(f"NUM_PASSAGES must be 1 or more, got {num_passages}.")
    if retriever not in RETRIEVERS:
        raise ValueError(f"RETRIEVER must be one of {', '.join(RETRIEVERS)}, got {retriever!r}.")
    if retriever == "hybrid":
        check_weight(dense_weight)
    bm25.check_stemmer()
    by_task = files.find_files(questions)
    for paths in by_task.values():
        if not in_bucket(data_dir) and paths[0].resolve().parent == Path(data_dir).resolve():
            raise ValueError(f"{data_dir} holds the questions themselves. Write elsewhere.")
    by_id = None if triviaqa is None else read_questions(triviaqa)
    # Read to their ends before the work starts: a bad line must not surface after hours.
    counts = {
        name: sum(1 for _ in read_task(name, paths, by_id)) for name, paths in by_task.items()
    }
    passages = Passages.open(passages_dir)
    everything = _open(retriever, passages, bm25, dense, dense_weight)
    training: Retriever | None = None
    ks = sorted({k for k in KS if k <= num_passages} | {num_passages})
    report: dict[str, Report] = {"passages": {}, "pages": {}}
    for name, paths in by_task.items():
        stem, chosen = Path(name).stem, everything
        if stem.endswith(f"-{TRAIN}"):
            if training is None:
                training = _of_split(everything, TRAIN)
            chosen = training
        _say(f"{', '.join(str(path) for path in paths)}: {counts[name]} questions")
        asked = read_task(name, paths, by_id, question_words)
        scores = RetrievalScores(ks)
        found = _retrieve_file(asked, counts[name], chosen, num_passages, scores)
        if jax.process_index() == 0:
            path = os.path.join(data_dir, name)
            write_json_lines(path, found)
            corpus_check.note(path, passages)
        else:
            # Searching is the work of all processes, writing is that of one.
            collections.deque(found, maxlen=0)
        report["passages"][stem] = scores.passages()
        report["pages"][stem] = scores.pages()
    report = {
        name: {stem: row for stem, row in rows.items() if row} for name, rows in report.items()
    }
    _print("Recall of passages, by the gold paragraphs", report["passages"])
    _print("KILT's R-precision and recall of pages", report["pages"])
    return report


def _open(
    name: str, passages: Passages, bm25: Bm25Config, dense: DenseConfig, weight: float
) -> Retriever:
    if name == "bm25":
        return Bm25Retriever(passages, bm25)
    found = DenseRetriever.open(passages, dense)
    return (
        found if name == "dense" else HybridRetriever(Bm25Retriever(passages, bm25), found, weight)
    )


def _of_split(everything: Retriever, split: str) -> Retriever:
    rows = retrievers.rows_of_split(everything.passages, split)
    # Where the split hides nothing, a second index of BM25 would be the first one again.
    return everything if len(rows) == len(everything.passages) else everything.among(rows)


def _retrieve_file(
    asked: Iterable[dict[str, Any]],
    count: int,
    retriever: Retriever,
    k: int,
    scores: RetrievalScores,
) -> Iterator[dict[str, Any]]:
    for example in _with_progress(retrievers.retrieve(retriever, asked, k), count):
        scores.add(example, _pages(retriever, example["retrieved"]))
        yield example


def _pages(retriever: Retriever, retrieved: Sequence[dict[str, Any]]) -> list[str] | None:
    rows = retriever.passages.rows([one["id"] for one in retrieved])
    records = [retriever.record(int(row)) for row in rows]
    if not all("page" in record for record in records):
        return None
    return [str(record["page"]) for record in records]


def _with_progress(found: Iterable[Any], total: int) -> Iterator[Any]:
    progress = Progress("retrieve", total, "questions", emit=_say)
    for one in found:
        yield one
        progress.advance()
    progress.log()


def _print(title: str, rows: Report) -> None:
    if rows:
        _say(f"{title}:\n{format_report(rows)}")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
