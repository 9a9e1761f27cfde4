"""A loaded checkpoint that answers questions, from a memory or from passages that it encodes.

    predictor = Predictor.load("runs/glimmer", lengths, passages_dir="data/passages",
                               memory_dir="runs/memory", batch_sizes=(1, 8))
    predictor.warm_up()
    predictor.answer([{"id": "1", "input": "formatted stream to file-like"}])

Modes `eval` and `infer` are thin wrappers around it; see docs/serving.md.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths
from glimmer_jax.corpus.ids import id_number
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory.fingerprint import encoder_fingerprint, passages_fingerprint
from glimmer_jax.memory.lookup import Lookup, open_lookup
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval.bm25 import Bm25, Bm25Config
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.serving import param_layout
from glimmer_jax.serving.step import Batch, Predict, add_candidates, encode_candidates
from glimmer_jax.vocabulary import Vocabulary, question_text
from glimmer_jax.weights import parameters
from glimmer_jax.weights.load import load

Example = dict[str, Any]


def check_something_to_read(passages_dir: Any | None, memory_dir: Any | None) -> None:
    """Raises ValueError if there are neither passages nor a memory."""
    if passages_dir is None and memory_dir is None:
        raise ValueError(
            "There is nothing to read: set PASSAGES_DIR (passages are encoded for each question) "
            "or MEMORY_DIR (written by --run_mode=build_memory)."
        )


def check_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError naming the first question that is malformed, and its field."""
    for place, question in enumerate(questions):
        if not isinstance(question, Mapping):
            raise ValueError(
                f"Question {place} must be a dict with id and input, got {question!r}."
            )
        for name in ("id", "input"):
            if not isinstance(question.get(name), str):
                raise ValueError(
                    f"Question {place} needs a string as {name!r}, got {question.get(name)!r}."
                )
        try:
            question["input"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Question {place} ({question['id']!r}): input has a character that is no text "
                f"(a surrogate at position {error.start}). Decode the text as UTF-8."
            ) from None
        if "retrieved" in question and not _are_passages(question["retrieved"]):
            raise ValueError(
                f"Question {place} ({question['id']!r}): retrieved must be a list of passages, "
                f"[{{'id': 7}}, ...], got {question['retrieved']!r}. Leave it out to use BM25."
            )


def _are_passages(retrieved: Any) -> bool:
    return isinstance(retrieved, Sequence) and all(
        isinstance(passage, Mapping) and type(passage.get("id")) in (int, str)
        for passage in retrieved
    )


class Predictor:
    """A model that answers questions; created by `load`.

    Attributes:
      lengths: Q, T, K and P of every batch.
      passages: the corpus, or None.
      from_memory: whether passages are read as memory.
      batch_sizes: numbers of rows that programs are compiled for, ascending.
      truncated: questions so far that were longer than Q and were cut.
    """

    def __init__(
        self,
        model: GlimmerModel,
        params: Any,
        mesh: Mesh,
        lengths: Lengths,
        vocabulary: Vocabulary,
        passages: Passages | None,
        lookup: Lookup | None,
        bm25: Bm25Config,
        batch_sizes: Sequence[int],
        seed: int,
    ):
        self.lengths = lengths
        self.passages = passages
        self.batch_sizes = sorted(batch_sizes)
        self.from_memory = lookup is not None
        self.truncated = 0
        self._lookup = lookup
        self._params = params
        self._vocabulary = vocabulary
        self._predict = Predict(model, mesh, lookup, seed)
        self._bm25 = bm25
        self._index: Bm25 | None = None

    @classmethod
    def load(
        cls,
        checkpoint_path: Any,
        lengths: Lengths,
        *,
        model: GlimmerModel | None = None,
        passages_dir: Any | None = None,
        memory_dir: Any | None = None,
        vocabulary: Vocabulary = Vocabulary(),
        mesh: MeshConfig = MeshConfig(),
        memory_bytes_per_device: int = 0,
        unknown_passages: Literal["error", "mask"] = "error",
        bm25: Bm25Config = Bm25Config(),
        batch_sizes: Sequence[int] = (8,),
        seed: int = 0,
    ) -> "Predictor":
        """Opens all files, checks that they belong together, and places the parameters.

        Args:
          checkpoint_path: a run, one of its steps or a `.safetensors` file, of any cut; or a public
            T5.
          lengths: Q, T, K and P.
          model: FiD, LUMEN or GLIMMER, to change the cut, the passages kept or the decoding; None
            for the checkpoint's own model with greedy decoding.
          passages_dir: the corpus, or its opened `Passages`; needed for retrieval, for titles, and
            for tokens if there is no memory.
          memory_dir: read passages as memory.
          vocabulary: that of the model.
          mesh: devices.
          memory_bytes_per_device: a memory that fits into this is kept on the devices.
          unknown_passages: ids missing from the memory raise an `error`, or are treated as absent
            with `mask` (`masked` counts them).
          bm25: settings of the index, which is built when a question first needs it.
          batch_sizes: numbers of questions per batch; one program is compiled for each.
          seed: of sampled answers (`DecodeConfig.temperature`).

        Raises:
          ValueError: neither passages nor memory, no model given and none recorded in the checkpoint,
            files that do not belong together, or batches that do not divide over the devices.
        """
        check_something_to_read(passages_dir, memory_dir)
        devices = make_mesh(mesh)
        parts = partitioning.parts(devices.shape, axes.BATCH)
        if not batch_sizes or any(size < 1 or size % parts for size in batch_sizes):
            raise ValueError(
                f"batch_sizes={tuple(batch_sizes)} must be multiples of {parts}, the devices that a "
                "batch is divided over (slice x data x fsdp)."
            )
        passages = passages_dir
        if passages is not None and not isinstance(passages, Passages):
            passages = Passages.open(passages, vocabulary.fingerprint)
        if passages is not None and memory_dir is None:
            passages.warn_of_cuts(lengths.passage)
        loaded = load(checkpoint_path)
        platform = devices.devices.flat[0].platform
        trained = model or GlimmerModel(loaded.answering_config())
        model = param_layout.unrolled(trained, platform)
        # A checkpoint that records its model is fitted to the serving layout at once. Any other one
        # must have the layout of the given model.
        target = trained if loaded.config is None else model
        host_params = parameters.fit(loaded, checkpoint_path, target, vocabulary.fingerprint)
        host_params = param_layout.unstack(target, host_params)
        lookup = None
        if memory_dir is not None:
            fingerprint = encoder_fingerprint(host_params, model.config)
            codec = model.config.memory_codec
            store = MemoryStore.open(memory_dir, fingerprint, vocabulary.fingerprint, codec=codec)
            if passages is not None:
                store.check_passages(passages_fingerprint(passages.manifest))
            lookup = open_lookup(
                store, devices, lengths.passage, memory_bytes_per_device, unknown_passages
            )
        params = parameters.place(host_params, model, devices)
        params = param_layout.lay_out(
            model, params, max(batch_sizes) * model.decode.beams, platform
        )
        return cls(
            model, params, devices, lengths, vocabulary, passages, lookup, bm25, batch_sizes, seed
        )

    def predict(self, batch: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Answers of a numpy batch: int32 tokens `[B, T]`, and the model's outputs per row.

        The batch has `passage_tokens`, or `passage_ids` where passages are read as memory.

        Raises `StopRequested` in all processes of a job where one was asked to stop.
        """
        STOP.poll_together()
        return self._predict(self._params, batch)

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches for `predict`; memory on disk is read one batch ahead."""
        return self._predict.prefetch(batches)

    @property
    def waited(self) -> float:
        """Seconds for which `prefetch` has waited for memory."""
        return self._predict.waited

    @property
    def masked(self) -> int:
        """Number of passages so far that were missing from the memory."""
        return 0 if self._lookup is None else self._lookup.masked

    def warm_up(self, candidates: Sequence[str] | None = None) -> None:
        """Compiles the programs of all `batch_sizes`, or loads them from JAX's compilation cache.

        With candidates, the programs for that number of candidates, whatever their text.
        """
        encoded = self._encoded(candidates)
        for size in self.batch_sizes:
            self.predict(self._batch([], [], size, encoded))

    def answer(
        self,
        questions: Sequence[Mapping[str, Any]],
        candidates: Sequence[str] | None = None,
    ) -> list[Example]:
        """Answers to any number of questions, `{"id", "input"}`, in order.

        Args:
          questions: batched at the largest of `batch_sizes`; the remainder uses the smallest size
            that fits. Passages are those in `retrieved`, `[{"id"}]`, or BM25's.
          candidates: the only answers allowed; the one with the highest log-likelihood is returned.

        Returns:
          KILT's form of a prediction, `{"id", "input", "output": [{"answer", "provenance":
          [{"wikipedia_id", "title"}]}]}`, the distinct pages of the passages, best first; `score`,
          the log-likelihood of the answer; and `passages`, `[{"id", "title", "score", "kept"}]`, best
          first. With candidates also `candidates`, `[{"answer", "score"}]`, best first.

        Raises:
          ValueError: there is no corpus to name passages from, a question is malformed, or the
            candidates are empty or too long.
        """
        return list(self.answers(questions, candidates))

    def answers(
        self,
        questions: Sequence[Mapping[str, Any]],
        candidates: Sequence[str] | None = None,
    ) -> Iterator[Example]:
        """`answer` as an iterator; memory of the next batch is read while one is computed."""
        passages, encoded = self._corpus(), self._encoded(candidates)
        check_questions(questions)
        in_flight: deque[tuple[Sequence[Mapping[str, Any]], list[list[int]]]] = deque()

        def batches() -> Iterator[Batch]:
            for start in range(0, len(questions), self.batch_sizes[-1]):
                group = questions[start : start + self.batch_sizes[-1]]
                ids = [self._passage_ids(question) for question in group]
                in_flight.append((group, ids))
                size = next(size for size in self.batch_sizes if size >= len(group))
                yield self._batch([question["input"] for question in group], ids, size, encoded)

        for batch in self.prefetch(batches()):
            tokens, aux = self.predict(batch)
            for row, (question, ids) in enumerate(zip(*in_flight.popleft(), strict=True)):
                text = self._vocabulary.decode(tokens[row])
                record = _record(question, ids, text, aux, row, passages)
                if candidates is not None:
                    record["candidates"] = _ranked(candidates, aux["candidate_scores"][row])
                    record["output"][0]["answer"] = record["candidates"][0]["answer"]
                yield record

    def _encoded(self, candidates: Sequence[str] | None) -> np.ndarray | None:
        if candidates is None:
            return None
        return encode_candidates(candidates, self._vocabulary, self.lengths.target)

    def _corpus(self) -> Passages:
        if self.passages is None:
            raise ValueError(
                "PASSAGES_DIR is needed beside MEMORY_DIR: answers contain the titles of passages."
            )
        return self.passages

    def _passage_ids(self, question: Mapping[str, Any]) -> list[int]:
        count = self.lengths.passages
        if "retrieved" in question:
            return [id_number(passage["id"]) for passage in question["retrieved"][:count]]
        if self._index is None:
            self._index = Bm25(self._corpus().records(), self._bm25)
        hits = self._index.search([question["input"]], count)[0]
        return [id_number(self._index.records[row]["id"]) for row, _ in hits]

    def _batch(
        self,
        questions: Sequence[str],
        passage_ids: Sequence[Sequence[int]],
        batch_size: int,
        candidates_NT: np.ndarray | None,
    ) -> Batch:
        """A batch without targets, padded with empty rows."""
        lengths = self.lengths
        tokens_BQ = np.zeros((batch_size, lengths.question), np.int32)
        ids_BK = np.full((batch_size, lengths.passages), -1, np.int64)
        for row, (question, ids) in enumerate(zip(questions, passage_ids, strict=True)):
            tokens = self._vocabulary.encode(question_text(question))
            self.truncated += len(tokens) > lengths.question
            tokens = tokens[: lengths.question]
            tokens_BQ[row, lengths.question - len(tokens) :] = tokens
            ids_BK[row, : len(ids)] = ids
        batch: Batch = {
            "question_tokens": tokens_BQ,
            "passage_ids": ids_BK,
            "decoder_input_tokens": np.zeros((batch_size, lengths.target), np.int32),
        }
        if not self.from_memory:
            passages = self._corpus()
            batch["passage_tokens"] = passages.tokens(passages.rows(ids_BK), lengths.passage)
        return add_candidates(batch, candidates_NT)


def _record(
    question: Mapping[str, Any],
    ids: Sequence[int],
    prediction: str,
    aux: Mapping[str, np.ndarray],
    row: int,
    passages: Passages,
) -> Example:
    scores = aux["passage_scores"][row][: len(ids)]
    kept = set(aux["kept_passages"][row].tolist())
    # Passages missing from the memory were not read and are left out.
    order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
    rows = passages.rows(np.asarray(ids, np.int64))
    records = {place: passages.text(int(rows[place])) for place in order.tolist()}
    # A passage without a page is its own page.
    pages = {
        str(passage.get("page", passage.get("document", passage["id"]))): passage["title"]
        for passage in records.values()
    }
    return {
        "id": question["id"],
        "input": question["input"],
        "output": [
            {
                "answer": prediction,
                "provenance": [
                    {"wikipedia_id": page, "title": title} for page, title in pages.items()
                ],
            }
        ],
        "score": round(float(aux["scores"][row]), 4),
        "passages": [
            {
                "id": passage["id"],
                "title": passage["title"],
                "score": round(float(scores[place]), 4),
                "kept": place in kept,
            }
            for place, passage in records.items()
        ],
    }


def _ranked(candidates: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-scores, kind="stable").tolist()
    return [{"answer": candidates[i], "score": round(float(scores[i]), 4)} for i in order]
