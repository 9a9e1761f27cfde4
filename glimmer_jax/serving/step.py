"""Answers for numpy batches, with passages from tokens or from a memory.

Answers can be restricted to candidates, such as FEVER's SUPPORTS and REFUTES.
"""

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from glimmer_jax.memory.lookup import Lookup
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import own_rows, put_batch
from glimmer_jax.runtime.prefetch import ReadAhead
from glimmer_jax.vocabulary import Vocabulary

Batch = dict[str, Any]
_MEMORY = ("passage_memory", "passage_lengths")
# Features that the first program reads.
READ = ("question_tokens", "passage_tokens", *_MEMORY)


class Reading(NamedTuple):
    """The first program's result, on the devices, for the second."""

    encoded: jax.Array  # [B, S, D], states of the kept passages
    mask: jax.Array  # bool [B, S]
    aux: dict[str, jax.Array]  # passage_scores [B, K], kept_passages [B, m]
    length: int  # T
    candidates: jax.Array | None  # int32 [B, N, T]


def read_step(model: GlimmerModel) -> Any:
    """Jitted `read_batch`, the first of the two programs: `(params, batch) -> (encoded, mask, aux)`."""
    return jax.jit(model.read_batch)


def answer_step(model: GlimmerModel) -> Any:
    """Jitted `answer_batch`, the second program; `number` is the index of the batch."""

    @functools.partial(jax.jit, static_argnums=6)
    def step(
        params: Any, encoded: Any, mask: Any, candidates: Any, seed: Any, number: Any, length: int
    ) -> Any:
        rng = jax.random.fold_in(jax.random.key(seed), number)
        return model.answer_batch(
            params, encoded, mask, length=length, rng=rng, candidates=candidates
        )

    return step


class Predict:
    """The model's `predict_batch_with_aux` over numpy batches, compiled once for each batch shape.

    Every process passes the complete batch, computes its own rows and gets all answers. Batches have
    `passage_tokens`, or `passage_ids` if `lookup` reads their memory; `gold_passages` are returned as
    given. If the model samples its answers, a batch's key derives from `seed` and the number of
    previous batches.
    """

    def __init__(
        self, model: GlimmerModel, mesh: Mesh, lookup: Lookup | None = None, seed: int = 0
    ):
        self._mesh = mesh
        self._lookup = lookup
        self._seed = seed
        self._numbers = itertools.count()
        self._read_step = read_step(model)
        self._answer_step = answer_step(model)
        self._ahead = ReadAhead(self.load_memory)

    def over(self, lookup: Lookup | None) -> "Predict":
        """The same compiled programs over another memory."""
        other = copy.copy(self)
        other._lookup = lookup
        other._ahead = ReadAhead(other.load_memory)
        return other

    @property
    def waited(self) -> float:
        """Seconds that `prefetch` has kept its takers waiting for memory, see `ReadAhead`."""
        return self._ahead.waited

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; their memory on disk is read one batch ahead."""
        # Memory on the mesh is fetched by a device program: there is nothing to wait for, and all
        # processes must start their programs in the same order.
        if self._lookup is None or self._lookup.whole_batch:
            return iter(batches)
        return self._ahead(batches)

    def __call__(self, params: Any, batch: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """int32 tokens `[B, T]`, and per row the model's auxiliary outputs."""
        return self.answer(params, self.read(params, batch))

    def read(self, params: Any, batch: Batch) -> "Reading":
        """The first program: reranks, and reads the kept passages; returns before it has run."""
        batch = self.load_memory(batch)
        own = own_rows(self._mesh, len(batch["question_tokens"]))
        rest = {name: value[own] for name, value in batch.items() if name not in _MEMORY}
        placed = put_batch(rest, self._mesh)
        placed |= {name: batch[name] for name in _MEMORY if name in batch}
        inputs = {name: value for name, value in placed.items() if name in READ}
        with jax.set_mesh(self._mesh):
            encoded, mask, aux = self._read_step(params, inputs)
        if "gold_passages" in placed:
            aux["gold_passages"] = placed["gold_passages"]
        length = batch["decoder_input_tokens"].shape[1]
        return Reading(encoded, mask, aux, length, placed.get("candidate_tokens"))

    def answer(self, params: Any, reading: "Reading") -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The second program: int32 tokens `[B, T]`, and per row the model's auxiliary outputs."""
        number = np.uint32(next(self._numbers))
        with jax.set_mesh(self._mesh):
            tokens, aux = self._answer_step(
                params,
                reading.encoded,
                reading.mask,
                reading.candidates,
                np.uint32(self._seed),
                number,
                reading.length,
            )
        aux = {**aux, **reading.aux}
        return _fetch(tokens), {name: _fetch(value) for name, value in aux.items()}

    def load_memory(self, batch: Batch) -> Batch:
        """The batch with the memory of its passages, on the devices, instead of their tokens.

        Unchanged where passages are read as tokens, or their memory is there already.
        """
        lookup = self._lookup
        if lookup is None or "passage_memory" in batch:
            return batch
        rows = lookup.rows(batch["passage_ids"])
        if lookup.whole_batch:
            memory = dict(zip(_MEMORY, lookup(rows), strict=True))
        else:
            own = lookup(rows[own_rows(self._mesh, len(rows))])
            memory = put_batch(dict(zip(_MEMORY, own, strict=True)), self._mesh)
        return {**{k: v for k, v in batch.items() if k != "passage_tokens"}, **memory}


def _fetch(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def encode_candidates(candidates: Sequence[str], vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Texts as int32 `[N, T]`, each with its end token, padded with 0.

    Args:
      candidates: the answers to choose from.
      vocabulary: of the model.
      length: T.

    Raises:
      ValueError: there are none, or one is empty, a duplicate, or longer than T.
    """
    if isinstance(candidates, str) or not all(isinstance(answer, str) for answer in candidates):
        raise ValueError(f'CANDIDATES is a list of answers, ["yes", "no"]; got {candidates!r}.')
    if not candidates:
        raise ValueError(
            "CANDIDATES is an empty list. Give the answers to choose from, or None to generate "
            "answers."
        )
    tokens_NT = np.zeros((len(candidates), length), np.int32)
    seen: dict[tuple[int, ...], str] = {}
    for row, text in enumerate(candidates):
        ids = (*vocabulary.encode(text), vocabulary.eos_id)
        if len(ids) == 1:
            raise ValueError(f"Candidate {row} of CANDIDATES, {text!r}, is empty. Leave it out.")
        if len(ids) > length:
            raise ValueError(
                f"Candidate {text!r} of CANDIDATES has {len(ids)} tokens, end token included, and "
                f"answers have {length}. Shorten it, or raise targets in TASK_FEATURE_LENGTHS."
            )
        if ids in seen:
            raise ValueError(
                f"Candidates {seen[ids]!r} and {text!r} of CANDIDATES have the same tokens. Leave one "
                "out."
            )
        seen[ids] = text
        tokens_NT[row, : len(ids)] = ids
    return tokens_NT


def add_candidates(batch: dict[str, Any], tokens_NT: np.ndarray | None) -> dict[str, Any]:
    """The batch with the same `candidate_tokens` for every question, if there are candidates."""
    if tokens_NT is None:
        return batch
    rows = len(batch["question_tokens"])
    return {**batch, "candidate_tokens": np.broadcast_to(tokens_NT, (rows, *tokens_NT.shape))}
