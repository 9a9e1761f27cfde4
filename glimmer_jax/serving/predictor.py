"""A loaded checkpoint that answers questions, from a memory or from passages that it encodes.

    predictor = Predictor.load("runs/glimmer", lengths, passages_dir="data/passages",
                               memory_dir="runs/memory", batch_sizes=(1, 8))
    predictor.warm_up()
    predictor.answer([{"id": "1", "input": "formatted stream to file-like"}])

Modes `eval` and `infer` are thin wrappers around it; see docs/serving.md.
"""

import copy
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths
from glimmer_jax.corpus.ids import id_number
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory.fingerprint import encoder_fingerprint, passages_fingerprint
from glimmer_jax.memory.lookup import Lookup, LookupConfig, open_lookup
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.retrieval.retriever import Retriever
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.serving import param_layout
from glimmer_jax.serving.question_batch import Prepared, check_something_to_read, question_batch
from glimmer_jax.serving.records import Example, check_questions, rank, record
from glimmer_jax.serving.step import Batch, Predict, Reading, add_candidates, encode_candidates
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import parameters
from glimmer_jax.weights.find_vocabulary import vocabulary_of
from glimmer_jax.weights.load import load


class Predictor:
    """A model that answers questions; created by `load`.

    Attributes:
      lengths: Q, T, K and P of every batch.
      passages: the corpus, or None.
      from_memory: whether passages are read as memory.
      batch_sizes: numbers of rows that programs are compiled for, ascending.
      truncated: questions so far that were longer than Q and were cut.
      without_passages: questions so far for which no passage was found.
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
        retriever: RetrieverConfig,
        batch_sizes: Sequence[int],
        seed: int,
    ):
        self.lengths = lengths
        self.passages = passages
        self.batch_sizes = sorted(batch_sizes)
        self.from_memory = lookup is not None
        self.truncated = self.without_passages = 0
        self._model = model
        self._mesh = mesh
        self._lookup = lookup
        self._params = params
        self._vocabulary = vocabulary
        self._seed = seed
        self._predict = Predict(model, mesh, lookup, seed)
        self._retriever_config = retriever
        self._retriever: Retriever | None = None  # opened at the first question that needs it

    @classmethod
    def load(
        cls,
        checkpoint_path: Any,
        lengths: Lengths,
        *,
        model: GlimmerModel | None = None,
        passages_dir: Any | None = None,
        memory_dir: Any | None = None,
        vocabulary: Vocabulary | None = None,
        mesh: MeshConfig = MeshConfig(),
        lookup: LookupConfig = LookupConfig(),
        retriever: RetrieverConfig = RetrieverConfig(),
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
          vocabulary: that of the model; None for the checkpoint's (`weights.find_vocabulary`).
          mesh: devices.
          lookup: where the memory is kept, and whether ids missing from it raise an error or are
            masked (`masked` counts them).
          retriever: of questions without `retrieved`; opened when a question first needs it.
          batch_sizes: numbers of questions per batch; one program is compiled for each.
          seed: of sampled answers (`DecodeConfig.temperature`).

        Raises:
          ValueError: neither passages nor memory, no model or vocabulary given and none recorded in
            the checkpoint, files that do not belong together, or batches that do not divide over the
            devices.
        """
        retriever.check()
        check_something_to_read(passages_dir, memory_dir)
        devices = make_mesh(mesh)
        parts = partitioning.parts(devices.shape, axes.BATCH)
        if not batch_sizes or any(size < 1 or size % parts for size in batch_sizes):
            raise ValueError(
                f"batch_sizes={tuple(batch_sizes)} must be multiples of {parts}, the devices that a "
                "batch is divided over (slice x data x fsdp)."
            )
        loaded = load(checkpoint_path)
        trained = model or GlimmerModel(loaded.answering_config(memory_dir))
        vocabulary = vocabulary_of(trained, vocabulary, loaded, str(checkpoint_path))
        passages = passages_dir
        if passages is not None and not isinstance(passages, Passages):
            passages = Passages.open(passages, vocabulary.fingerprint)
        if passages is not None and memory_dir is None:
            passages.warn_of_cuts(lengths.passage)
        platform = devices.devices.flat[0].platform
        model = param_layout.unrolled(trained, platform)
        # A checkpoint that records its model is fitted to the serving layout at once. Any other one
        # must have the layout of the given model.
        target = trained if loaded.config is None else model
        host_params = parameters.fit(loaded, checkpoint_path, target, vocabulary.fingerprint)
        host_params = param_layout.unstack(target, host_params)
        opened = None
        if memory_dir is not None:
            fingerprint = encoder_fingerprint(host_params, model.config)
            codec = model.config.memory_codec
            store = MemoryStore.open(memory_dir, fingerprint, vocabulary.fingerprint, codec=codec)
            if passages is not None:
                store.check_passages(passages_fingerprint(passages.manifest))
            opened = open_lookup(store, devices, lengths.passage, lookup)
        params = parameters.place(host_params, model, devices)
        params = param_layout.lay_out(
            model, params, max(batch_sizes) * model.decode.beams, platform
        )
        readers = (model, params, devices, lengths, vocabulary)
        return cls(*readers, passages, opened, retriever, batch_sizes, seed)

    @property
    def num_kept(self) -> int:
        """m: passages that are read for each question."""
        return self._model.config.num_kept or self.lengths.passages

    @property
    def reranks(self) -> bool:
        """Whether the model scores passages and keeps the best."""
        return self._model.config.num_kept is not None

    def keeping(self, num_kept: int) -> "Predictor":
        """The same predictor with another m; parameters, passages and memory are shared.

        Raises ValueError where the model scores no passages, or `num_kept` exceeds K.
        """
        if num_kept == self.num_kept:
            return self
        if not self.reranks or not 1 <= num_kept <= self.lengths.passages:
            raise ValueError(
                f"num_kept={num_kept} must be from 1 to {self.lengths.passages} (K), and the model must "
                f"rerank; this one has num_kept={self._model.config.num_kept}."
            )
        config = dataclasses.replace(self._model.config, num_kept=num_kept)
        other = copy.copy(self)
        other._model = self._model.with_config(config)
        other._predict = Predict(other._model, self._mesh, self._lookup, self._seed)
        return other

    def reopened(self) -> "Predictor":
        """A predictor over the newest version of passages and memory; this one if they are the same.

        Parameters and compiled programs are shared. This predictor stays usable.

        Raises ValueError for files that do not belong to the model or to each other.
        """
        passages, lookup = self.passages, self._lookup
        if passages is not None:
            passages = Passages.open(passages.place, self._vocabulary.fingerprint)
        if lookup is not None:
            lookup = lookup.reopened()
            if passages is not None:
                lookup.store.check_passages(passages_fingerprint(passages.manifest))
        same = passages is self.passages or (
            passages is not None
            and self.passages is not None
            and passages.manifest == self.passages.manifest
        )
        if same and lookup is self._lookup:
            return self
        other = copy.copy(self)
        other.passages, other._lookup = passages, lookup
        other._retriever = None
        other._predict = self._predict.over(lookup)
        return other

    def over(self, newest: "Predictor") -> "Predictor":
        """This predictor's m and compiled programs over passages and memory of another one."""
        other = copy.copy(newest)
        other._model, other._predict = self._model, self._predict.over(newest._lookup)
        return other

    def describe(self) -> dict[str, Any]:
        """Fingerprints of encoder, passages, their texts and memory, and the memory's version."""
        described: dict[str, Any] = {}
        if self.passages is not None:
            described["passages"] = passages_fingerprint(self.passages.manifest)
            described["corpus"] = f"sha256:{self.passages.corpus_sha256}"
        if self._lookup is not None:
            manifest = self._lookup.store.manifest
            described["memory_version"] = manifest.version
            described["encoder"] = manifest.identity.encoder_fingerprint
        return described

    def check_passages(self, ids: Sequence[Any]) -> None:
        """Raises ValueError for ids that the corpus lacks."""
        self._corpus().rows([id_number(identifier) for identifier in ids])

    def first_title(self) -> str:
        """The title of the corpus' first passage."""
        return str(self._corpus().record(0)["title"])

    def encode_candidates(self, candidates: Sequence[str]) -> np.ndarray:
        """int32 `[N, T]`; raises ValueError as `answer`."""
        return encode_candidates(candidates, self._vocabulary, self.lengths.target)

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

    def warm_up(self, num_candidates: int = 0) -> None:
        """Compiles the programs of all `batch_sizes`, or loads them from JAX's compilation cache.

        With `num_candidates`, the programs that choose among that many candidates.
        """
        encoded = None
        if num_candidates:
            encoded = np.zeros((num_candidates, self.lengths.target), np.int32)
        for size in self.batch_sizes:
            self.predict(add_candidates(self._batch([], [], size), encoded))

    def answer(
        self,
        questions: Sequence[Mapping[str, Any]],
        candidates: Sequence[str] | None = None,
    ) -> list[Example]:
        """Answers to any number of questions, `{"id", "input"}`, in order.

        Args:
          questions: batched at the largest of `batch_sizes`; the remainder uses the smallest size
            that fits. Passages are those in `retrieved`, `[{"id"}]`, or the retriever's.
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
        self._corpus()
        check_questions(questions)
        encoded_NT = None if candidates is None else self.encode_candidates(candidates)
        under_way: deque[Prepared] = deque()

        def batches() -> Iterator[Batch]:
            for start in range(0, len(questions), self.batch_sizes[-1]):
                prepared = self.prepare(questions[start : start + self.batch_sizes[-1]], encoded_NT)
                under_way.append(prepared)
                yield prepared.batch

        for batch in self.prefetch(batches()):
            tokens, aux = self.predict(batch)
            for row, answer in enumerate(self.records(under_way.popleft(), tokens, aux)):
                if candidates is not None:
                    answer["candidates"] = rank(candidates, aux["candidate_scores"][row])
                    answer["output"][0]["answer"] = answer["candidates"][0]["answer"]
                yield answer

    def prepare(
        self, questions: Sequence[Mapping[str, Any]], candidates: np.ndarray | None = None
    ) -> Prepared:
        """The batch of some questions: retrieval and tokens, without memory.

        Args:
          questions: as for `answer`, at most the largest of `batch_sizes`.
          candidates: int32 `[N, T]` for all questions, or `[len(questions), N, T]`.

        Raises ValueError as `answer`.
        """
        ids = self.retrieve(questions)
        size = next(size for size in self.batch_sizes if size >= len(questions))
        batch = self._batch([question["input"] for question in questions], ids, size)
        if candidates is not None and candidates.ndim == 3:
            rows = np.zeros(size, np.intp)  # filling rows take the first question's candidates
            rows[: len(candidates)] = np.arange(len(candidates))
            batch["candidate_tokens"] = candidates[rows]
        else:
            batch = add_candidates(batch, candidates)
        return Prepared(questions, ids, batch)

    def retrieve(self, questions: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Ids of at most K passages for each question: those of `retrieved`, or the retriever's."""
        count, passages = self.lengths.passages, self._corpus()
        asked = [question["input"] for question in questions if "retrieved" not in question]
        if asked and self._retriever is None:
            self._retriever = self._retriever_config.open(passages)
        results = iter(self._retriever.search(asked, count) if asked and self._retriever else ())
        ids = [
            [id_number(passage["id"]) for passage in question["retrieved"][:count]]
            if "retrieved" in question
            else [int(passages.ids[row]) for row, _ in next(results)]
            for question in questions
        ]
        self.without_passages += sum(not found for found in ids)
        return ids

    def load_memory(self, batch: Batch) -> Batch:
        """The batch with its passages' memory, where passages are read as memory."""
        return self._predict.load_memory(batch)

    def read(self, batch: Batch) -> Reading:
        """The first half of `predict`: reranks, and reads the kept passages."""
        return self._predict.read(self._params, batch)

    def finish(self, reading: Reading) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The second half of `predict`: answers from what was read."""
        return self._predict.answer(self._params, reading)

    def records(
        self,
        prepared: Prepared,
        tokens: np.ndarray,
        aux: Mapping[str, np.ndarray],
        texts: bool = False,
    ) -> Iterator[Example]:
        """Records as of `answer`, without `candidates`; with `texts`, passages have their `text`."""
        passages = self._corpus()
        questions = zip(prepared.questions, prepared.passage_ids, strict=True)
        for row, (question, ids) in enumerate(questions):
            text = self._vocabulary.decode(tokens[row])
            yield record(question, ids, text, aux, row, passages, texts)

    def _corpus(self) -> Passages:
        if self.passages is None:
            raise ValueError(
                "PASSAGES_DIR is needed beside MEMORY_DIR: answers contain the titles of passages."
            )
        return self.passages

    def _batch(
        self, questions: Sequence[str], passage_ids: Sequence[Sequence[int]], size: int
    ) -> Batch:
        passages = None if self.from_memory else self._corpus()
        batch, cut = question_batch(
            questions, passage_ids, size, self.lengths, self._vocabulary, passages
        )
        self.truncated += cut
        return batch
