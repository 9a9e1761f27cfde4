"""Mode `retrieve`: adds passages to every question of task files, by BM25, GTR or both.

Where the corpus has splits, training questions see passages of the training split alone: held-out
passages must not be trained on, not even as negatives.
"""

import collections
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from glimmer_jax.corpus import retrieved_notes
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt import files
from glimmer_jax.kilt.examples import provenance, read_examples
from glimmer_jax.kilt.files import read_questions, read_task
from glimmer_jax.kilt.gold import name_no_passage
from glimmer_jax.metrics.retrieval import KS, RetrievalScores, format_report
from glimmer_jax.modes import checks, outputs
from glimmer_jax.retrieval import retriever as retrievers
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.retrieval.retriever import Retriever
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage import local_copy
from glimmer_jax.storage.folder import exists, in_bucket, of_file
from glimmer_jax.storage.json_lines import write_json_lines

logger = logging.getLogger(__name__)

# Questions of this split see passages of this split alone, where passages have one.
TRAIN = "train"
_PLACE = ("wikipedia_id", "title")
_ABSENT, _COMPLETE, _OTHER = range(3)

Report = dict[str, dict[str, float]]


def retrieve(
    passages_dir: str,
    questions: str,
    data_dir: str,
    num_passages: int,
    retriever: RetrieverConfig = RetrieverConfig(),
    triviaqa: str | None = None,
    question_words: int | None = None,
    overwrite: bool = False,
) -> dict[str, Report]:
    """Writes each task file with `retrieved` into `data_dir`, and prints recall.

    `dense` and `hybrid` build the index first. Rerunning a stopped job resumes the index, and keeps
    the files that it completed.

    Args:
      passages_dir: written by mode `passages`.
      questions: pattern of task files, such as `data/questions/*.jsonl`, `kilt/*-kilt.jsonl` or the
        hub's `kilt_tasks/*/*.parquet`.
      data_dir: where each `<task>-<split>.jsonl` (`kilt.files.task_file`) is written for tasks to
        read, with the note of `corpus.retrieved_notes`.
      num_passages: K, passages per question.
      retriever: BM25, dense retrieval or both.
      triviaqa: pattern of TriviaQA's own files, whose questions KILT's files name by id.
      question_words: most words of entity-linking and dialogue inputs, in the written files too;
        None keeps all.
      overwrite: replace files of another request in `data_dir`.

    Returns:
      `{"passages": {file: recall of passages}, "pages": {file: KILT's scores of pages}}`; pages
      only where all passages name theirs.

    Raises:
      ValueError: missing settings or files, invalid lines, files that may not be replaced, or an
        index of another corpus or encoder.
    """
    checks.required(PASSAGES_DIR=passages_dir, QUESTIONS=questions, DATA_DIR=data_dir)
    if num_passages < 1:
        raise ValueError(f"NUM_PASSAGES must be 1 or more, got {num_passages}.")
    if question_words is not None and question_words < 1:
        raise ValueError(f"QUESTION_WORDS must be 1 or more, got {question_words}.")
    retriever.check()
    by_task = files.find_files(questions)
    _check_data_dir(data_dir, by_task)
    by_id = None if triviaqa is None else read_questions(triviaqa)
    # All files are checked before the work starts: an invalid line must not surface after hours.
    counts = {
        name: sum(1 for _ in read_task(name, paths, by_id)) for name, paths in by_task.items()
    }
    if empty := [name for name, count in counts.items() if not count]:
        raise ValueError(f"QUESTIONS: {', '.join(empty)} has no questions. Leave the file out.")
    passages = Passages.open(passages_dir)
    request = {
        "corpus": passages.corpus_sha256,
        "num_passages": num_passages,
        **_used_settings(retriever),
        "question_words": question_words,
        "triviaqa": None if by_id is None else sorted(by_id.items()),
    }
    requests = {
        name: {**request, "questions": [_sha256(path) for path in paths]}
        for name, paths in by_task.items()
    }
    with outputs.locked(data_dir, in_place=True) as check_lock:
        complete = _complete_files(data_dir, requests, overwrite)
        everything = training = retriever.open(passages)
        if any(_is_training(name) for name in by_task.keys() - complete):
            training = _of_split(everything, TRAIN)

        ks = sorted({k for k in KS if k <= num_passages} | {num_passages})
        report: dict[str, Report] = {"passages": {}, "pages": {}}
        for name, paths in by_task.items():
            _print_once(f"{', '.join(str(path) for path in paths)}: {counts[name]} questions")
            scores, path = RetrievalScores(ks), os.path.join(data_dir, name)
            if name in complete:
                _print_once(f"  {path} is complete and kept")
                for example in read_examples(local_copy.fetch_file("DATA_DIR", path)):
                    scores.add(example, _pages(everything, example["retrieved"]))
            else:
                chosen = training if _is_training(name) else everything
                asked = read_task(name, paths, by_id, question_words)
                retrieved = _retrieve_file(asked, counts[name], chosen, num_passages, scores)
                _write(path, retrieved, passages, requests[name], check_lock)
            if scores.passages().get(f"recall_at_{ks[-1]}") == 0 and jax.process_index() == 0:
                _warn_of_provenance(name, read_task(name, paths, by_id), passages)
            for kind, row in (("passages", scores.passages()), ("pages", scores.pages())):
                if row:
                    report[kind][Path(name).stem] = row
    _print("Recall of gold passages", report["passages"])
    _print("KILT's R-precision and recall of pages", report["pages"])
    return report


def _check_data_dir(data_dir: str, by_task: Mapping[str, Sequence[Path]]) -> None:
    """Raises ValueError where the output would overwrite the questions."""
    for paths in by_task.values():
        if not in_bucket(data_dir) and paths[0].resolve().parent == Path(data_dir).resolve():
            raise ValueError(
                f"DATA_DIR: {data_dir} holds the QUESTIONS themselves. Write to another folder."
            )


def _used_settings(retriever: RetrieverConfig) -> dict[str, Any]:
    """The settings that this method reads; None for the others."""
    method, dense = retriever.method, retriever.dense
    return {
        "retriever": method,
        "bm25": dataclasses.asdict(retriever.bm25) if method != "dense" else None,
        "encoder": [_files(dense.encoder_dir), dense.dtype] if method != "bm25" else None,
        "dense_weight": retriever.dense_weight if method == "hybrid" else None,
    }


def _files(folder: str | None) -> list[Any]:
    """Checksums of the weights and settings in a local folder: others are another encoder."""
    found = sorted(Path(str(folder)).rglob("*"))
    kinds = (".safetensors", ".msgpack", ".json", ".model")
    files = [path for path in found if path.suffix in kinds and path.is_file()]
    return [[str(path.relative_to(str(folder))), _sha256(path)] for path in files]


def _is_training(name: str) -> bool:
    return Path(name).stem.endswith(f"-{TRAIN}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete_files(
    data_dir: str, requests: dict[str, dict[str, Any]], overwrite: bool
) -> set[str]:
    """Files that an earlier run of the same request completed.

    Raises ValueError for existing files of another request, unless they may be replaced.
    """
    states = []
    for name, request in requests.items():
        path = os.path.join(data_dir, name)
        kvstore, key = of_file(path)
        if not exists(kvstore, key):
            states.append(_ABSENT)
        elif retrieved_notes.answers_request(path, request):
            states.append(_COMPLETE)
        else:
            states.append(_ABSENT if overwrite else _OTHER)
    if jax.process_count() > 1:
        # One process decides: it may have written a file before another looks.
        states = multihost_utils.broadcast_one_to_all(np.array(states)).tolist()
    if _OTHER in states:
        name = list(requests)[states.index(_OTHER)]
        raise ValueError(
            f"DATA_DIR: {os.path.join(data_dir, name)} exists, with other settings, questions, "
            "encoder or passages. Set OVERWRITE=True to replace it, or write to another folder."
        )
    return {name for name, state in zip(requests, states, strict=True) if state == _COMPLETE}


def _warn_of_provenance(name: str, examples: Iterable[dict[str, Any]], passages: Passages) -> None:
    """Logs a warning where no provenance of a file names any passage."""
    places = [place for example in examples for place in provenance(example)]
    if name_no_passage(places, passages.records()):
        shown = "; ".join(
            ", ".join(
                f"{field} {place[field]!r}" for field in _PLACE if place.get(field) is not None
            )
            for place in places[:3]
        )
        logger.warning(
            "QUESTIONS: no provenance of %s names a passage of %s, so that no passage is gold. The first "
            "entries: %s. Compare them with `page`, `title` or `id` of the corpus.",
            name, passages.place, shown,
        )  # fmt: skip


def _of_split(everything: Retriever, split: str) -> Retriever:
    rows = retrievers.rows_of_split(everything.passages, split)
    # A split of all passages needs no second index.
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


def _write(
    path: str,
    retrieved: Iterable[dict[str, Any]],
    passages: Passages,
    request: dict[str, Any],
    check_lock: Callable[[], None],
) -> None:
    """Writes a task file and its note. All processes search, one writes."""

    def before(content: Path) -> None:
        check_lock()
        # Without its note, the file would be taken for that of another request.
        retrieved_notes.write_note(path, content, passages, request)

    if jax.process_index() == 0:
        write_json_lines(path, retrieved, before)
    else:
        collections.deque(retrieved, maxlen=0)


def _pages(retriever: Retriever, retrieved: Sequence[dict[str, Any]]) -> list[str] | None:
    """Pages of the retrieved passages; None for a corpus without pages."""
    if not retriever.passages.have_pages:
        return None
    rows = retriever.passages.rows_of([passage["id"] for passage in retrieved])
    return [str(retriever.record(int(row))["page"]) for row in rows]


def _with_progress(examples: Iterable[Any], total: int) -> Iterator[Any]:
    progress = Progress("retrieve", total, "questions", emit=_print_once)
    for example in examples:
        yield example
        progress.advance()
    progress.log()


def _print(title: str, rows: Report) -> None:
    if rows:
        _print_once(f"{title}:\n{format_report(rows)}")


def _print_once(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
