"""Mode `infer`: answers to the questions of a file, or to questions typed at the prompt."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.json_lines import read_json_lines, write_json_lines
from glimmer_jax.lengths import Lengths
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.memory.lookup import open_lookup
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks, parameters
from glimmer_jax.modes.predictor import Predictor
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.passages import Passages
from glimmer_jax.retrieval.bm25 import Bm25, Bm25Config
from glimmer_jax.text import question_text

Example = dict[str, Any]


def infer(
    model: GlimmerModel,
    checkpoint_path: str,
    task_feature_lengths: Mapping[str, Any],
    passages_dir: str,
    memory_dir: str | None = None,
    questions: str | None = None,
    output_path: str | None = None,
    batch_size: int = 8,
    bm25: Bm25Config = Bm25Config(),
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
    memory_bytes_per_device: int = 0,
) -> None:
    """Writes, or prints, `{"id", "input", "prediction", "score", "passages": [{"id", "title",
    "score", "kept"}]}`, passages by score, best first.

    Args:
      model: FiD, LUMEN or GLIMMER.
      checkpoint_path: a run's folder, a step's, or a `.safetensors` file, of any cut.
      task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      passages_dir: the corpus: titles, retrieval, and tokens where there is no memory.
      memory_dir: read passages as memory.
      questions: JSON Lines of `{"id", "input"}`, with `retrieved` or without (then BM25 retrieves);
        None asks at the prompt, one question a line.
      output_path: gets JSON Lines; needed with `questions`.
      batch_size: questions at a time over all devices.
      bm25: settings of the index.
      mesh: devices.
      vocabulary: that of the model.
      memory_bytes_per_device: a memory that fits into this is kept on the devices.

    Raises:
      ValueError: settings, files or lengths that do not fit together.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path, PASSAGES_DIR=passages_dir)
    lengths = checks.lengths_for(model.config, task_feature_lengths)
    checks.vocabulary_fits(model.config, vocabulary)
    devices = make_mesh(mesh)
    checks.batch_size("BATCH_SIZE", batch_size, devices)
    examples = None
    if questions is not None:
        checks.required(OUTPUT_PATH=output_path)
        examples = _read_questions(checks.existing_file("QUESTIONS", questions))
    corpus = Passages.open(passages_dir, vocabulary.fingerprint)
    host_params = parameters.load(checkpoint_path, model, vocabulary.fingerprint)
    lookup = None
    if memory_dir is not None:
        fingerprint = encoder_fingerprint(host_params, model.config)
        store = MemoryStore.open(memory_dir, fingerprint, vocabulary.fingerprint)
        lookup = open_lookup(store, devices, lengths.passage, memory_bytes_per_device)
    params = parameters.place(host_params, model, devices)
    predict = Predictor(model, devices, lookup)
    index = None
    if examples is None or any("retrieved" not in one for one in examples):
        index = Bm25(corpus.records(), bm25)

    def answer(some: Sequence[Example]) -> list[Example]:
        found = [_passage_ids(one, index, lengths.passages) for one in some]
        batch = make_batch([one["input"] for one in some], found, batch_size, vocabulary, lengths)
        if lookup is None:
            rows = corpus.rows(batch["passage_ids"])
            batch["passage_tokens"] = corpus.tokens(rows, lengths.passage)
        tokens, aux = predict(params, batch)
        return [
            _record(one, ids, vocabulary.decode(tokens[row]), aux, row, corpus)
            for row, (one, ids) in enumerate(zip(some, found, strict=True))
        ]

    if examples is not None:
        groups = (examples[i : i + batch_size] for i in range(0, len(examples), batch_size))
        count = write_json_lines(str(output_path), (one for some in groups for one in answer(some)))
        print(f"Wrote {count} answers to {output_path}.")
        return
    for question in _typed(sys.stdin):
        _show(answer([{"id": "typed", "input": question}])[0])


def make_batch(
    questions: Sequence[str],
    passage_ids: Sequence[Sequence[int]],
    batch_size: int,
    vocabulary: Vocabulary,
    lengths: Lengths,
) -> dict[str, np.ndarray]:
    """A batch of the contract without targets, filled up with empty rows."""
    tokens_BQ = np.zeros((batch_size, lengths.question), np.int32)
    ids_BK = np.full((batch_size, lengths.passages), -1, np.int64)
    for row, (question, ids) in enumerate(zip(questions, passage_ids, strict=True)):
        tokens = vocabulary.encode(question_text(question))[: lengths.question]
        tokens_BQ[row, lengths.question - len(tokens) :] = tokens
        ids_BK[row, : len(ids)] = ids
    return {
        "question_tokens": tokens_BQ,
        "passage_ids": ids_BK,
        "decoder_input_tokens": np.zeros((batch_size, lengths.target), np.int32),
    }


def _read_questions(path: Path) -> list[Example]:
    examples = []
    for number, line in read_json_lines(path):
        if not isinstance(line.get("input"), str):
            raise ValueError(f"{path}:{number}: wanted a question in `input`, got {line}.")
        examples.append({"id": str(number), **line})
    if not examples:
        raise ValueError(f"QUESTIONS: {path} holds no question.")
    return examples


def _passage_ids(example: Example, index: Bm25 | None, count: int) -> list[int]:
    if "retrieved" in example:
        return [one["id"] for one in example["retrieved"][:count]]
    assert index is not None
    return [index.records[row]["id"] for row, _ in index.search([example["input"]], count)[0]]


def _record(
    example: Example,
    ids: Sequence[int],
    prediction: str,
    aux: Mapping[str, np.ndarray],
    row: int,
    corpus: Passages,
) -> Example:
    scores = aux["passage_scores"][row][: len(ids)]
    kept = set(aux["kept_passages"][row].tolist())
    rows = corpus.rows(np.asarray(ids, np.int64))
    return {
        "id": example["id"],
        "input": example["input"],
        "prediction": prediction,
        "score": round(float(aux["scores"][row]), 4),
        "passages": [
            {
                "id": int(ids[place]),
                "title": corpus.text(int(rows[place]))["title"],
                "score": round(float(scores[place]), 4),
                "kept": int(place) in kept,
            }
            for place in np.argsort(-scores, kind="stable")
        ],
    }


def _typed(lines: Iterable[str]) -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("question (empty to stop): ", end="", flush=True)
        line = next(iter(lines), "").strip()
        if not line:
            return
        yield line


def _show(record: Example) -> None:
    print(f"{record['prediction']}    (log probability {record['score']:.2f})")
    for one in record["passages"]:
        print(f"  {'read' if one['kept'] else '    '}  {one['score']:8.3f}  {one['title']}")
    sys.stdout.flush()
