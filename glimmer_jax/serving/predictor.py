"""A loaded checkpoint that answers: with its memory, or with passages that it encodes itself.

    predictor = Predictor.load("runs/glimmer", lengths, passages_dir="data/passages",
                               memory_dir="runs/memory", batch_sizes=(1, 8))
    predictor.warm_up()
    predictor.answer([{"id": "1", "input": "formatted stream to file-like"}])

Modes `eval` and `infer` are thin around it; docs/serving.md says more.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths
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


class Predictor:
    """See the module's docstring; made by `load`.

    Attributes:
      lengths: Q, T, K and P of every batch.
      passages: the corpus, or None.
      from_memory: whether passages are read as memory.
      batch_sizes: numbers of rows that programs are compiled for, rising.
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
        """Opens everything, checks that it belongs together, puts the parameters on the mesh.

        Args:
          checkpoint_path: a run's folder, a step's, or a `.safetensors` file, of any cut; or public T5.
          lengths: Q, T, K and P.
          model: FiD, LUMEN or GLIMMER, to cut, keep or decode otherwise than the checkpoint says; None
            for the checkpoint's own, greedy.
          passages_dir: the corpus; needed to retrieve, to name titles, and where there is no memory.
          memory_dir: read passages as memory.
          vocabulary: that of the model.
          mesh: devices.
          memory_bytes_per_device: a memory that fits into this is kept on the devices.
          unknown_passages: what ids that the memory lacks are: an error, or absent (`masked` counts).
          bm25: settings of the index, which is made when a question first needs it.
          batch_sizes: numbers of questions that `answer` computes at a time; each is compiled once.
          seed: of drawn answers (`DecodeConfig.temperature`).

        Raises:
          ValueError: neither passages nor memory, no model given and none described by the checkpoint,
            files that do not belong together, or batches that do not divide over the devices.
        """
        if passages_dir is None and memory_dir is None:
            raise ValueError(
                "There is nothing to read: set PASSAGES_DIR (passages are encoded for each question) "
                "or MEMORY_DIR (made by --run_mode=build_memory)."
            )
        devices = make_mesh(mesh)
        parts = partitioning.parts(devices.shape, axes.BATCH)
        if not batch_sizes or any(size < 1 or size % parts for size in batch_sizes):
            raise ValueError(
                f"batch_sizes={tuple(batch_sizes)} must be multiples of {parts}, the devices that a "
                "batch is divided over (slice x data x fsdp)."
            )
        passages = None
        if passages_dir is not None:
            passages = Passages.open(passages_dir, vocabulary.fingerprint)
            if memory_dir is None:
                passages.warn_of_cuts(lengths.passage)
        loaded = load(checkpoint_path)
        model = model or GlimmerModel(loaded.answering_config())
        host_params = parameters.fit(loaded, checkpoint_path, model, vocabulary.fingerprint)
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
        platform = devices.devices.flat[0].platform
        host_params = param_layout.unstack(model, host_params)
        model = param_layout.unrolled(model, platform)
        params = parameters.place(host_params, model, devices)
        params = param_layout.lay_out(
            model, params, max(batch_sizes) * model.decode.beams, platform
        )
        return cls(
            model, params, devices, lengths, vocabulary, passages, lookup, bm25, batch_sizes, seed
        )

    def predict(self, batch: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Answers of a numpy batch: int32 tokens `[B, T]`, and per row what the model returns.

        The batch has `passage_tokens`, or `passage_ids` where passages are read as memory.

        Raises `StopRequested` in all processes of a job where one was asked to stop.
        """
        STOP.poll_together()
        return self._predict(self._params, batch)

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches for `predict`, with memory from disk read while it works on the one before."""
        return self._predict.prefetch(batches)

    @property
    def waited(self) -> float:
        """Seconds that `prefetch` has kept its takers waiting for memory."""
        return self._predict.waited

    @property
    def masked(self) -> int:
        """Passages so far that the memory did not have."""
        return 0 if self._lookup is None else self._lookup.masked

    def warm_up(self, candidates: Sequence[str] | None = None) -> None:
        """Compiles the programs of all `batch_sizes`, or fetches them from JAX's compilation cache.

        With candidates, the programs for as many; any texts of the same number then use them.
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
          questions: computed in batches of the largest of `batch_sizes`, the rest in the smallest that
            holds it. Passages are those in `retrieved`, or BM25's.
          candidates: the only answers allowed; the one with the highest log probability is given.

        Returns:
          KILT's form of a prediction, `{"id", "input", "output": [{"answer", "provenance":
          [{"wikipedia_id", "title"}]}]}`, the pages of the passages without repetition, best first;
          and `score`, the log probability of the answer, and `passages`, `[{"id", "title", "score",
          "kept"}]`, best first. With candidates also `candidates`, `[{"answer", "score"}]`, best
          first.

        Raises:
          ValueError: there is no corpus to name passages from, or candidates are none, empty or too
            long.
        """
        return list(self.answers(questions, candidates))

    def answers(
        self,
        questions: Sequence[Mapping[str, Any]],
        candidates: Sequence[str] | None = None,
    ) -> Iterator[Example]:
        """`answer`, one after another; memory of the next batch is read while one is computed."""
        passages, encoded = self._corpus(), self._encoded(candidates)
        under_way: deque[tuple[Sequence[Mapping[str, Any]], list[list[int]]]] = deque()

        def batches() -> Iterator[Batch]:
            for start in range(0, len(questions), self.batch_sizes[-1]):
                some = questions[start : start + self.batch_sizes[-1]]
                found = [self._passage_ids(one) for one in some]
                under_way.append((some, found))
                size = next(size for size in self.batch_sizes if size >= len(some))
                yield self._batch([one["input"] for one in some], found, size, encoded)

        for batch in self.prefetch(batches()):
            tokens, aux = self.predict(batch)
            for row, (one, ids) in enumerate(zip(*under_way.popleft(), strict=True)):
                text = self._vocabulary.decode(tokens[row])
                record = _record(one, ids, text, aux, row, passages)
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
            raise ValueError("Answers name their passages: give PASSAGES_DIR beside MEMORY_DIR.")
        return self.passages

    def _passage_ids(self, question: Mapping[str, Any]) -> list[int]:
        count = self.lengths.passages
        if "retrieved" in question:
            return [one["id"] for one in question["retrieved"][:count]]
        if self._index is None:
            self._index = Bm25(self._corpus().records(), self._bm25)
        found = self._index.search([question["input"]], count)[0]
        return [self._index.records[row]["id"] for row, _ in found]

    def _batch(
        self,
        questions: Sequence[str],
        passage_ids: Sequence[Sequence[int]],
        batch_size: int,
        candidates_NT: np.ndarray | None,
    ) -> Batch:
        """A batch of the contract without targets, filled up with empty rows."""
        lengths = self.lengths
        tokens_BQ = np.zeros((batch_size, lengths.question), np.int32)
        ids_BK = np.full((batch_size, lengths.passages), -1, np.int64)
        for row, (question, ids) in enumerate(zip(questions, passage_ids, strict=True)):
            tokens = self._vocabulary.encode(question_text(question))[: lengths.question]
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
    # What the memory did not have was not read, and is not named.
    order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
    rows = passages.rows(np.asarray(ids, np.int64))
    records = {place: passages.text(int(rows[place])) for place in order.tolist()}
    # Passages without a page of their own stand for it.
    pages = {str(one.get("page", ids[place])): one["title"] for place, one in records.items()}
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
                "id": int(ids[place]),
                "title": one["title"],
                "score": round(float(scores[place]), 4),
                "kept": place in kept,
            }
            for place, one in records.items()
        ],
    }


def _ranked(candidates: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(-scores, kind="stable").tolist()
    return [{"answer": candidates[i], "score": round(float(scores[i]), 4)} for i in order]
