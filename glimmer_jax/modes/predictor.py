"""Answers for numpy batches, passages read from tokens or from a memory."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from glimmer_jax.memory.lookup import Lookup
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.training.prefetch import put_batch


class Predictor:
    """The model's `predict_batch_with_aux`, compiled once for each batch shape.

    Every process passes the whole batch, computes its own rows, and gets all answers.
    """

    def __init__(self, model: GlimmerModel, mesh: Mesh, lookup: Lookup | None = None):
        """`lookup` gives the memory of `passage_ids`; without it batches have `passage_tokens`."""
        self._mesh = mesh
        self._lookup = lookup
        self._predict = jax.jit(model.predict_batch_with_aux)

    def __call__(
        self, params: Any, batch: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Tokens int32 `[B, T]`, and per row what the model returns, `gold_passages` as given."""
        rows = len(batch["question_tokens"]) // jax.process_count()
        own = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        batch = {name: value[own] for name, value in batch.items()}
        placed = put_batch(batch, self._mesh)
        if self._lookup is not None:
            memory, lengths = self._lookup(self._lookup.rows(batch["passage_ids"]))
            placed.pop("passage_tokens", None)
            found = {"passage_memory": memory, "passage_lengths": lengths}
            # A lookup on the mesh returns arrays that already lie there.
            placed |= found if isinstance(lengths, jax.Array) else put_batch(found, self._mesh)
        with jax.set_mesh(self._mesh):
            tokens, aux = self._predict(params, placed)
        if "gold_passages" in placed:
            aux["gold_passages"] = placed["gold_passages"]
        return _fetch(tokens), {name: _fetch(value) for name, value in aux.items()}


def _fetch(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
