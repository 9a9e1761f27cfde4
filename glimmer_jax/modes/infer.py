"""Mode `infer`: answers to the questions of a file, or to questions typed at the prompt."""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from glimmer_jax import axes, partitioning
from glimmer_jax.kilt.examples import check_example
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval import corpus_check
from glimmer_jax.retrieval.bm25 import Bm25Config
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.serving.step import encode_candidates
from glimmer_jax.storage.json_lines import read_json_lines, write_json_lines
from glimmer_jax.vocabulary import Vocabulary, question_text

Example = dict[str, Any]


def infer(
    model: GlimmerModel,
    checkpoint_path: str,
    task_feature_lengths: Mapping[str, Any],
    passages_dir: str,
    memory_dir: str | None = None,
    questions: str | None = None,
    output_dir: str | None = None,
    batch_size: int = 8,
    bm25: Bm25Config = Bm25Config(),
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
    memory_bytes_per_device: int = 0,
    unknown_passages: Literal["error", "mask"] = "error",
    candidates: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Writes, or prints, answers with scores and passages; see `Predictor.answer`.

    A file of answers is a submission to KILT: pages in the reranker's order, and fields that KILT's
    scripts do not look at.

    Args:
      model: FiD, LUMEN or GLIMMER.
      checkpoint_path: a run's folder, a step's, or a `.safetensors` file, of any cut.
      task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      passages_dir: the corpus: titles, retrieval, and tokens where there is no memory.
      memory_dir: read passages as memory.
      questions: JSON Lines of `{"id", "input"}`, with `retrieved` or without (then BM25 retrieves);
        None asks at the prompt, one question a line.
      output_dir: gets `predictions-NAME.jsonl`, NAME that of `questions`; needed with `questions`.
      batch_size: questions at a time over all devices.
      bm25: settings of the index.
      mesh: devices.
      vocabulary: that of the model.
      memory_bytes_per_device: a memory that fits into this is kept on the devices.
      unknown_passages: ids that the memory lacks are an `error`, or with `mask` absent, and counted.
      candidates: the only answers allowed, for all questions; None lets the model write its own.
      seed: of drawn answers.

    Raises:
      ValueError: settings, files or lengths that do not fit together.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path, PASSAGES_DIR=passages_dir)
    lengths = checks.lengths_for(model.config, task_feature_lengths)
    checks.vocabulary_fits(model, vocabulary)
    devices = make_mesh(mesh)
    checks.batch_size("BATCH_SIZE", batch_size, devices)
    checks.passages_divide(lengths, devices)
    if candidates is not None:
        encode_candidates(candidates, vocabulary, lengths.target)
    examples = None
    if questions is not None:
        checks.required(INFER_OUTPUT_DIR=output_dir)
        examples = _read_questions(checks.existing_file("QUESTIONS", questions))
    else:
        batch_size = partitioning.parts(devices.shape, axes.BATCH)  # one question at a time
    predictor = Predictor.load(
        checkpoint_path,
        lengths,
        model=model,
        passages_dir=passages_dir,
        memory_dir=memory_dir,
        vocabulary=vocabulary,
        mesh=mesh,
        memory_bytes_per_device=memory_bytes_per_device,
        unknown_passages=unknown_passages,
        bm25=bm25,
        batch_sizes=(batch_size,),
        seed=seed,
    )
    if examples is not None:
        # Before the first answer, not after an hour of them.
        assert predictor.passages is not None
        corpus_check.check(str(questions), predictor.passages)
        predictor.passages.rows([p["id"] for one in examples for p in one.get("retrieved", ())])
        encoded = (vocabulary.encode(question_text(one["input"])) for one in examples)
        cut = sum(len(tokens) > lengths.question for tokens in encoded)
        if cut:
            print(f"{cut} questions are longer than {lengths.question} tokens and are cut.")
        answers = predictor.answers(examples, candidates)
        if jax.process_index():
            deque(answers, maxlen=0)  # of a job, one process writes what all compute
            return
        path = os.path.join(str(output_dir), f"predictions-{Path(str(questions)).stem}.jsonl")
        count = write_json_lines(path, answers)
        print(f"Wrote {count} answers to {path}.")
        if predictor.masked:
            print(f"{predictor.masked} of their passages are not in the memory, and were left out.")
        return
    for question in _typed(sys.stdin):
        _show(predictor.answer([{"id": "typed", "input": question}], candidates)[0])


def _read_questions(path: Path) -> list[Example]:
    examples: dict[str, Example] = {}
    for number, line in read_json_lines(path):
        if type(line.get("id", number)) is int:
            line = {**line, "id": str(line.get("id", number))}
        if problem := check_example(line):
            raise ValueError(f"{path}:{number}: {problem}.")
        if line["id"] in examples:
            raise ValueError(f"{path}:{number}: the id {line['id']!r} was given before. Keep one.")
        examples[line["id"]] = line
    if not examples:
        raise ValueError(f"QUESTIONS: {path} holds no question.")
    return list(examples.values())


def _typed(lines: Iterable[str]) -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("question (empty to stop): ", end="", flush=True)
        with STOP.grace(0.0):  # Nothing to save while a person types.
            line = next(iter(lines), "").strip()
        if not line:
            return
        yield line


def _show(record: Example) -> None:
    print(f"{record['output'][0]['answer']}    (log probability {record['score']:.2f})")
    for one in record["passages"]:
        print(f"  {'read' if one['kept'] else '    '}  {one['score']:8.3f}  {one['title']}")
    sys.stdout.flush()
