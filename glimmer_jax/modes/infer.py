"""Mode `infer`: answers to the questions of a file or of the prompt."""

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from glimmer_jax import axes, partitioning
from glimmer_jax.corpus import retrieved_notes
from glimmer_jax.kilt.examples import check_example, without_nulls
from glimmer_jax.modes import checks, outputs
from glimmer_jax.modes.settings import AnsweringConfig, CorpusConfig
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage.json_lines import read_json_lines, write_json_lines

Example = dict[str, Any]


def infer(
    reader: AnsweringConfig,
    task_feature_lengths: Mapping[str, Any] | None,
    batch_size: int,
    corpus: CorpusConfig,
    questions: str | None = None,
    output_dir: str | None = None,
    retriever: RetrieverConfig = RetrieverConfig(),
    overwrite: bool = False,
) -> None:
    """Writes or prints answers with scores and passages; see `Predictor.answer`.

    A file of answers is a KILT submission. Its pages are in the reranker's order; its further fields
    are ignored by KILT's scripts.

    Args:
      reader: the model and its checkpoint.
      task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`; None: the checkpoint's.
      batch_size: questions per batch, over all devices.
      corpus: titles, retrieval, and tokens if there is no memory.
      questions: JSON Lines of `{"id", "input"}`, optionally with `retrieved`.
        None reads questions from the prompt, one per line.
      output_dir: gets `predictions-NAME.jsonl`, NAME that of `questions`; required with `questions`.
      retriever: of questions without `retrieved`.
      overwrite: replace an existing file of answers.

    Raises:
      ValueError: settings, files or lengths that do not fit together, or a file of answers that may
        not be replaced.
    """
    checks.required(CHECKPOINT_PATH=reader.checkpoint_path, PASSAGES_DIR=corpus.passages_dir)
    retriever.check()
    if questions is not None:
        checks.required(INFER_OUTPUT_DIR=output_dir)
        stem = Path(questions.removesuffix(".gz")).stem
        path = os.path.join(str(output_dir), f"predictions-{stem}.jsonl")
        place = outputs.Place(
            path, path, lambda: outputs.replaceable("INFER_OUTPUT_DIR", path, overwrite)
        )
        place.check_early()
    answering = reader.prepare(corpus, task_feature_lengths, batch_size)
    examples: list[Example] | None = None
    if questions is not None:
        file = checks.existing_file("QUESTIONS", questions)
        retrieved_notes.check_content(questions, file, retrieved_notes.file_sha256(questions))
        examples = _read_questions(file)
    else:
        # One question at a time.
        batch_size = partitioning.parts(answering.mesh.shape, axes.BATCH)
    passages = checks.open_passages(corpus.passages_dir, questions, answering.vocabulary)
    if examples is not None and passages is not None:
        passages.rows_of([p["id"] for example in examples for p in example.get("retrieved", ())])
    if examples is None:
        predictor = reader.load(answering, corpus, (batch_size,), retriever, passages)
        for question in _typed():
            _show(predictor.answer([{"id": "typed", "input": question}], reader.candidates)[0])
        return
    with outputs.sole_writer(place) as held:
        if held.complete:
            return
        predictor = reader.load(answering, corpus, (batch_size,), retriever, passages)
        answers = predictor.answers(examples, reader.candidates)
        if jax.process_index():
            deque(answers, maxlen=0)  # all processes compute, one writes
            count = 0
        else:
            count = write_json_lines(path, answers, before=lambda _: held.check_lock())
    if jax.process_index():
        return
    print(f"Wrote {count} answers to {path}.")
    if predictor.truncated:
        print(
            f"{predictor.truncated} questions are longer than {predictor.lengths.question} tokens and "
            "were cut."
        )
    if predictor.without_passages:
        print(
            f"{predictor.without_passages} questions found no passage; their answers have no source."
        )
    if predictor.masked:
        print(f"{predictor.masked} passages are missing from the memory and were left out.")


def _read_questions(path: Path) -> list[Example]:
    examples: dict[str, Example] = {}
    for number, record in read_json_lines(path):
        line = without_nulls(record)
        if type(line.get("id", number)) is int:
            line = {**line, "id": str(line.get("id", number))}
        if problem := check_example(line):
            raise ValueError(f"{path}:{number}: {problem}.")
        if line["id"] in examples:
            raise ValueError(f"{path}:{number}: the id {line['id']!r} is a duplicate. Keep one.")
        examples[line["id"]] = line
    if not examples:
        raise ValueError(f"QUESTIONS: {path} has no questions.")
    return list(examples.values())


def _typed() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("question (empty to stop): ", end="", flush=True)
        try:
            with STOP.grace(0.0):  # Nothing to save while a person types.
                line = sys.stdin.readline().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"The question is not valid {error.encoding}: {error}.") from error
        if not line:
            return
        yield line


def _show(record: Example) -> None:
    print(f"{record['output'][0]['answer']}    (log-likelihood {record['score']:.2f})")
    if not record["passages"]:
        print("  No passage was found: the answer has no source.")
    for passage in record["passages"]:
        read = "read" if passage["kept"] else "    "
        print(f"  {read}  {passage['score']:8.3f}  {passage['title']}")
    sys.stdout.flush()
