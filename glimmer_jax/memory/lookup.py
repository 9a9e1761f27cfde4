"""Lookup: rows of the store to the passage memory of a batch, from the mesh or from disk.

`MeshLookup` holds the entire memory on the devices, sharded over all of them; `DiskLookup` reads what a
batch needs, one batch ahead. Both return the same bits for the same rows, so `open_lookup` chooses by
size alone.
"""

import abc
import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from glimmer_jax import partitioning
from glimmer_jax.memory import table as tables
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.prefetch import ReadAhead

Batch = dict[str, Any]
Memory = tuple[dict[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class LookupConfig:
    """The place of a memory, and the treatment of ids that it lacks."""

    bytes_per_device: int = 0  # a memory that fits into this is kept on the devices
    unknown: Literal["error", "mask"] = "error"  # raise, or treat as absent and count

    def __post_init__(self) -> None:
        if self.bytes_per_device < 0:
            raise ValueError(
                f"MEMORY_BYTES_PER_DEVICE must not be negative, got {self.bytes_per_device}."
            )
        if self.unknown not in ("error", "mask"):
            raise ValueError(
                f"UNKNOWN_PASSAGES must be 'error' or 'mask', got {self.unknown!r:.80}."
            )


class Lookup(abc.ABC):
    """The interface of both: ids to rows, and batches with their memory.

    Attributes:
      store: the memory store.
      length: P, tokens that passages are padded to.
      masked: number of passages so far that were treated as absent because their ids are unknown.
    """

    def __init__(self, store: MemoryStore, length: int, unknown: Literal["error", "mask"]):
        store.check_length(length)
        self.store = store
        self.length = length
        self.masked = 0
        self._unknown = unknown

    # Whether every process passes the rows of the global batch to a call, or only its own rows.
    whole_batch: bool

    @abc.abstractmethod
    def __call__(self, rows_BK: np.ndarray) -> Memory:
        """Rows int `[B, K]`, -1 for no passage, to their memory.

        Returns:
          The codec's arrays `[B, K, P, ...]`, zero beyond each passage; int32 lengths `[B, K]`.
        """

    def reopened(self) -> "Lookup":
        """A lookup over the newest version of the store; this one, if that is its version.

        Raises ValueError for a store of another encoder, vocabulary or codec.
        """
        identity = self.store.manifest.identity
        store = MemoryStore.open(
            self.store.path,
            identity.encoder_fingerprint,
            identity.vocabulary_fingerprint,
            codec=identity.codec,
        )
        return self if store.manifest == self.store.manifest else self._over(store)

    @abc.abstractmethod
    def _over(self, store: MemoryStore) -> "Lookup":
        """The same lookup over another version of the store."""

    def rows(self, passage_ids: np.ndarray) -> np.ndarray:
        """External ids `[...]` to rows; unknown ids raise ValueError, or are masked and counted."""
        rows = self.store.rows(passage_ids, self._unknown)
        self.masked += int(((rows < 0) & (np.asarray(passage_ids) >= 0)).sum())
        return rows

    def add(self, batch: Mapping[str, Any]) -> Batch:
        """The batch with `passage_memory` and `passage_lengths` for its `passage_ids`."""
        memory, lengths = self(self.rows(batch["passage_ids"]))
        return {**batch, "passage_memory": memory, "passage_lengths": lengths}

    def prefetch(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Batch]:
        """`add` for each batch, on a thread, while the caller uses the previous one."""
        return ReadAhead(self.add)(batches)


class DiskLookup(Lookup):
    """Memory that stays on disk or in a bucket; returns numpy arrays."""

    whole_batch = False

    def __init__(
        self, store: MemoryStore, length: int, unknown: Literal["error", "mask"] = "error"
    ):
        super().__init__(store, length, unknown)

    def _over(self, store: MemoryStore) -> "DiskLookup":
        return DiskLookup(store, self.length, self._unknown)

    def __call__(self, rows_BK: np.ndarray) -> Memory:
        rows_BK = np.asarray(rows_BK)
        arrays, lengths = self.store.read(rows_BK.reshape(-1), self.length)
        shaped = {name: x.reshape(*rows_BK.shape, *x.shape[1:]) for name, x in arrays.items()}
        return shaped, lengths.reshape(rows_BK.shape)


class MeshLookup(Lookup):
    """Memory on the devices of a mesh; returns jax arrays, sharded like a batch if B divides.

    Attributes:
      table: the memory; an argument of the jitted lookup, not a constant.
    """

    whole_batch = True

    def __init__(
        self,
        store: MemoryStore,
        mesh: jax.sharding.Mesh,
        length: int,
        unknown: Literal["error", "mask"] = "error",
        page_tokens: int = tables.PAGE_TOKENS,
        bytes_per_device: int = sys.maxsize,  # a later version that needs more stays on disk
    ):
        super().__init__(store, length, unknown)
        self.mesh = mesh
        self._bytes_per_device = bytes_per_device
        self.table = tables.load(store, mesh, page_tokens)
        self._lookup = jax.jit(functools.partial(tables.lookup, length=length, mesh=mesh))

    def _over(self, store: MemoryStore) -> Lookup:
        config = LookupConfig(self._bytes_per_device, self._unknown)
        return open_lookup(store, self.mesh, self.length, config)

    def __call__(self, rows_BK: np.ndarray) -> Memory:
        rows_BK = np.asarray(rows_BK, np.int32)
        if rows_BK.size and not -1 <= rows_BK.min() <= rows_BK.max() < len(self.store):
            raise ValueError(
                f"Rows go from -1 (none) to {len(self.store) - 1} in the memory store "
                f"{self.store.path}; got {rows_BK.min()} to {rows_BK.max()}."
            )
        placed = jax.device_put(rows_BK, partitioning.replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            return self._lookup(self.table, placed)


def open_lookup(
    store: MemoryStore,
    mesh: jax.sharding.Mesh,
    length: int,
    config: LookupConfig = LookupConfig(),
) -> Lookup:
    """A MeshLookup if the part of each device fits in `bytes_per_device`, otherwise a DiskLookup."""
    if tables.bytes_per_device(store, mesh, tables.PAGE_TOKENS) <= config.bytes_per_device:
        limit = config.bytes_per_device
        return MeshLookup(store, mesh, length, config.unknown, bytes_per_device=limit)
    return DiskLookup(store, length, config.unknown)
