"""Answers for numpy batches, passages read from tokens or from a memory."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from glimmer_jax.memory.lookup import Lookup
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import own_rows
from glimmer_jax.training.prefetch import put_batch

Batch = dict[str, Any]
# (params, numpy batch) -> int32 tokens [B, T], and per row what the model returns.
Predict = Callable[[Any, Batch], tuple[np.ndarray, dict[str, np.ndarray]]]


def predict_step(model: GlimmerModel) -> Any:
    """`(params, batch, seed, number of the batch) -> (tokens, aux)`, jitted."""

    @jax.jit
    def step(params: Any, batch: Batch, seed: Any, number: Any) -> Any:
        rng = jax.random.fold_in(jax.random.key(seed), number)
        return model.predict_batch_with_aux(params, batch, rng)

    return step


def make_predict(
    model: GlimmerModel, mesh: Mesh, lookup: Lookup | None = None, seed: int = 0
) -> Predict:
    """The model's `predict_batch_with_aux` over numpy batches, compiled once for each batch shape.

    Every process passes the whole batch, computes its own rows, and gets all answers. Batches have
    `passage_tokens`, or `passage_ids` where a `lookup` gives their memory; `gold_passages` come back
    as given. Where the model draws its answers, a batch's key comes from `seed` and the number of
    batches before it.
    """
    numbers = itertools.count()
    jitted = predict_step(model)

    def predict(params: Any, batch: Batch) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        own = own_rows(mesh, len(batch["question_tokens"]))
        placed = put_batch({name: value[own] for name, value in batch.items()}, mesh)
        if lookup is not None:
            rows = lookup.rows(batch["passage_ids"])
            memory, lengths = lookup(rows if lookup.whole_batch else rows[own])
            placed.pop("passage_tokens", None)
            found = {"passage_memory": memory, "passage_lengths": lengths}
            # A lookup on the mesh returns arrays that already lie there.
            placed |= found if lookup.whole_batch else put_batch(found, mesh)
        with jax.set_mesh(mesh):
            tokens, aux = jitted(params, placed, np.uint32(seed), np.uint32(next(numbers)))
        if "gold_passages" in placed:
            aux["gold_passages"] = placed["gold_passages"]
        return _fetch(tokens), {name: _fetch(value) for name, value in aux.items()}

    return predict


def _fetch(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
