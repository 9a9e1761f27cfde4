"""Answers for the server: one checkpoint, its compiled programs, and the version now served."""

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glimmer_jax.corpus.ids import id_number
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.server.protocol import Limits, Question, RequestError
from glimmer_jax.serving.predictor import Predictor, Prepared
from glimmer_jax.serving.records import rank

# A request's candidates are filled up to the next of these counts, or to the maximum.
CANDIDATE_COUNTS = (2, 8, 32)


@dataclasses.dataclass(frozen=True)
class _Version:
    """Predictors over one version of passages and memory, one for each m."""

    by_kept: Mapping[int, Predictor]
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Work:
    questions: Sequence[Question]
    predictor: Predictor
    prepared: Prepared
    description: dict[str, Any]
    timings: dict[str, float]  # seconds
    candidates: bool


class PredictorEngine:
    """`Predictor`s behind the interface of `batching.Batcher`.

    A batch keeps the version that it was prepared with, so a reload never mixes versions.

    Args:
      predictor: loaded, with a corpus.
      kept: values of m that are served; the first is the default. Must include the model's own.
      max_candidates: largest number of candidates of a request; 0 for none.
    """

    def __init__(self, predictor: Predictor, kept: Sequence[int] = (), max_candidates: int = 2):
        self._kept = tuple(kept) or (predictor.num_kept,)
        below = (count for count in CANDIDATE_COUNTS if count < max_candidates)
        self._candidate_counts = (*below, max_candidates) if max_candidates else ()
        by_kept = {m: predictor.keeping(m) for m in self._kept}
        self._version = _Version(by_kept, predictor.describe())
        self._lock = threading.Lock()

    @property
    def _predictor(self) -> Predictor:
        return self._version.by_kept[self._kept[0]]

    @property
    def batch_sizes(self) -> Sequence[int]:
        return self._predictor.batch_sizes

    @property
    def num_kept(self) -> int:
        return self._kept[0]

    def limits(self, **changes: Any) -> Limits:
        """The request limits that follow from the model; `changes` sets the others."""
        lengths = self._predictor.lengths
        kept = tuple(sorted(self._kept)) if self._predictor.reranks else ()
        candidates = max(self._candidate_counts, default=0)
        return Limits(passages=lengths.passages, kept=kept, candidates=candidates, **changes)

    def warm_up(self) -> None:
        """Builds the retriever's index and compiles every program that a request can need."""
        _search_once(self._predictor)
        for predictor in self._version.by_kept.values():
            predictor.warm_up()
            for count in self._candidate_counts:
                predictor.warm_up(count)

    def describe(self) -> dict[str, Any]:
        """Versions of model and stores."""
        return self._version.description

    def reload(self) -> bool:
        """Opens the newest version of passages and memory; returns whether it differs.

        Raises:
          ValueError: it does not belong to the model; the old version stays in use.
        """
        with self._lock:
            newest = self._predictor.reopened()
            if newest is self._predictor:
                return False
            _search_once(newest)
            newest.warm_up()  # The lookup of another memory is another program.
            # The model's programs are compiled once, for each m.
            by_kept = {m: old.over(newest) for m, old in self._version.by_kept.items()}
            self._version = _Version(by_kept, newest.describe())
            return True

    def key(self, question: Question) -> tuple[int, int]:
        """Questions with the same m and number of candidate slots share a program."""
        return question.num_kept or self._kept[0], self._slots(question.candidates)

    def _slots(self, candidates: Sequence[str] | None) -> int:
        if candidates is None:
            return 0
        return next(count for count in self._candidate_counts if count >= len(candidates))

    def check(self, question: Question) -> None:
        """Raises RequestError (422) for candidates or passages that cannot be answered from."""
        predictor = self._predictor
        try:
            if question.candidates is not None:
                predictor.encode_candidates(question.candidates)
            if question.retrieved is not None:
                predictor.check_passages(question.retrieved)
        except ValueError as error:
            raise RequestError(422, str(error)) from None

    def prepare(self, questions: Sequence[Question]) -> _Work:
        """Retrieval, tokens and memory of a batch whose questions have one key."""
        version = self._version
        kept, slots = self.key(questions[0])
        predictor = version.by_kept[kept]
        begun = time.monotonic()
        asked = [_example(question) for question in questions]
        with STOP.deferred():
            # One retriever serves every m.
            ids = version.by_kept[self._kept[0]].retrieve(asked)
        for example, question, found in zip(asked, questions, ids, strict=True):
            example["retrieved"] = [{"id": i} for i in found[: _read(question, kept)]]
        candidates = None
        if slots:
            candidates = np.stack(
                [_filled(predictor, q.candidates or (), slots) for q in questions]
            )
        prepared = predictor.prepare(asked, candidates)
        retrieved = time.monotonic()
        batch = predictor.load_memory(prepared.batch)
        jax.block_until_ready(batch.get("passage_memory"))
        timings = {"retrieval": retrieved - begun, "memory": time.monotonic() - retrieved}
        prepared = dataclasses.replace(prepared, batch=batch)
        return _Work(questions, predictor, prepared, version.description, timings, bool(slots))

    def compute(self, work: _Work) -> list[dict[str, Any]]:
        """Answers in the form of `POST /v1/answers`, each passage with its text."""
        begun = time.monotonic()
        reading = jax.block_until_ready(work.predictor.read(work.prepared.batch))
        read = time.monotonic()
        tokens, aux = work.predictor.finish(reading)
        timings = {**work.timings, "read": read - begun, "decode": time.monotonic() - read}
        records = work.predictor.records(work.prepared, tokens, aux, texts=True)
        answers = []
        for row, (question, record) in enumerate(zip(work.questions, records, strict=True)):
            ranks = {number: n for n, number in enumerate(work.prepared.passage_ids[row])}
            answer = {
                "id": question.id,
                "input": question.input,
                "answer": record["output"][0]["answer"],
                "log_likelihood": record["score"],
                "passages": [
                    {**passage, "rank": ranks[id_number(passage["id"])]}
                    for passage in record["passages"]
                ],
                "timings": timings,
                "version": work.description,
            }
            if work.candidates:
                assert question.candidates is not None
                scores = aux["candidate_scores"][row][: len(question.candidates)]
                answer["candidates"] = rank(question.candidates, scores)
                answer["answer"] = answer["candidates"][0]["answer"]
                answer["log_likelihood"] = answer["candidates"][0]["score"]
            answers.append(answer)
        return answers


def _search_once(predictor: Predictor) -> None:
    """Builds the index, and lets its library compile what a search with hits needs."""
    predictor.retrieve([{"input": predictor.first_title()}])


def _example(question: Question) -> dict[str, Any]:
    example: dict[str, Any] = {"id": question.id, "input": question.input}
    if question.retrieved is not None:
        example["retrieved"] = [{"id": i} for i in question.retrieved]
    return example


def _read(question: Question, kept: int) -> int | None:
    """How many of the retrieved passages the model gets; None for all."""
    if question.rerank:
        return question.num_passages
    # The model keeps every passage that it gets, so the retriever's choice stands.
    return min(kept, question.num_passages or kept)


def _filled(predictor: Predictor, candidates: Sequence[str], slots: int) -> np.ndarray:
    """int32 `[slots, T]`; free slots repeat the first candidate, and their scores are dropped."""
    tokens_NT = predictor.encode_candidates(candidates)
    rows = np.zeros(slots, np.intp)
    rows[: len(tokens_NT)] = np.arange(len(tokens_NT))
    return tokens_NT[rows]
