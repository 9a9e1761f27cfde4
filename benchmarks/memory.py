"""Synthetic passages, and a store of them built by the package's own job."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.setting import Setting
from glimmer_jax.memory import encoding
from glimmer_jax.memory.build import build_memory
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.memory.lookup import DiskLookup
from glimmer_jax.memory.manifest import EncodeProgram, Identity
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.model import GlimmerModel

ROWS = 10


class RandomPassages:
    """The given passages, all of full length; ids are rows."""

    def __init__(self, tokens_NP: np.ndarray):
        self._tokens = tokens_NP
        self.ids = np.arange(len(tokens_NP), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64 `[n]`, tokens of each row."""
        return np.full(len(rows), self._tokens.shape[1], np.int64)

    def tokens(self, rows: np.ndarray, length: int) -> np.ndarray:
        """int32 `[n, length]`."""
        return self._tokens[rows, :length]

    def records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yields one record per row."""
        return ({"title": str(row), "text": ""} for row in range(start, stop))


class SyntheticPassages:
    """Passages of `shortest` to `longest` tokens, computed from the row and never stored."""

    def __init__(self, count: int, shortest: int, longest: int):
        self._shortest = shortest
        self._spread = longest + 1 - shortest
        self.ids = np.arange(count, dtype=np.int64) * 7 + 3

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self, rows: Any) -> np.ndarray:
        """int32 `[n]`, tokens of each row."""
        mixed = np.asarray(rows, np.int64) * 2654435761
        return (self._shortest + mixed % self._spread).astype(np.int32)

    def tokens(self, rows: Any, length: int) -> np.ndarray:
        """int32 `[n, length]`, padded with 0."""
        rows = np.asarray(rows, np.int64)
        places = np.arange(length)[None]
        tokens = 2 + (rows[:, None] * 31 + places * 17) % 60
        return np.where(places < self.lengths(rows)[:, None], tokens, 0).astype(np.int32)

    def records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yields one record per row."""
        return ({"title": f"passage {row}"} for row in range(start, stop))


def build_lookup(
    model: GlimmerModel, params: Any, mesh: Mesh, tokens_NP: np.ndarray, setting: Setting, path: Any
) -> DiskLookup:
    """Builds the store at `path` and opens it without a cache, so that every question reads files."""
    config = model.config
    identity = Identity(
        encoder_fingerprint(params, config),
        "sha256:none",
        config.memory_codec,
        config.t5.emb_dim,
        setting.passage,
    )
    program = EncodeProgram(
        ROWS,
        (setting.passage,),
        config.t5.dtype,
        config.t5.matmul_dtype,
        jax.default_backend(),
        jax.__version__,
    )
    encode = encoding.bind_encoder(model.memory_states, params, mesh, config.memory_codec)
    build_memory(
        MemoryEncoder(encode, identity, program),
        RandomPassages(tokens_NP),
        path,
        passages_fingerprint="sha256:random",
    )
    store = MemoryStore.open(path, identity.encoder_fingerprint, cache_bytes=0)
    return DiskLookup(store, setting.passage)
