"""A dense index: a memory store with one vector per passage, row i for row i of a passages folder.

The store's manifest, records, checksums and versions are those of `glimmer_jax.memory`, so an index is
built, resumed, inspected and verified like a memory:

    glimmer --run_mode=memory --action=verify --gin_file=gin/runs/memory.gin --gin.MEMORY_DIR='"index"'
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from glimmer_jax.memory import manifest
from glimmer_jax.memory.fingerprint import files_fingerprint
from glimmer_jax.memory.manifest import Identity
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.storage import folder

# Vectors have length 1. Eleven bits of precision move a similarity by about 1e-5.
CODEC = "f16"
DTYPE = np.dtype(np.float16)


def texts_fingerprint(passages_manifest: Mapping[str, Any]) -> str:
    """`sha256:...` over ids and texts of a passages folder, from the checksums in its manifest."""
    return files_fingerprint(passages_manifest, ("ids.npy", "passages.jsonl"))


class Index:
    """A finished index, open for reading.

    Attributes:
      store: the memory store.
    """

    def __init__(self, store: MemoryStore):
        """Raises ValueError for a store that is not an index."""
        stored = store.manifest
        if (
            stored.identity.codec != CODEC
            or stored.withdrawn
            or stored.num_tokens != stored.num_passages
        ):
            raise ValueError(
                f"INDEX_DIR {store.path} is not a dense index: it needs one {CODEC} vector for each of "
                f"its passages, but has {stored.num_tokens} of type {stored.identity.codec} for "
                f"{stored.num_passages} passages, {len(stored.withdrawn)} of them withdrawn. Set "
                "INDEX_DIR to a new folder."
            )
        self.store = store

    @classmethod
    def open(
        cls, path: folder.Path, identity: Identity | None = None, passages: str | None = None
    ) -> "Index":
        """Opens an index.

        Args:
          path: a local folder, a TensorStore URL or a spec.
          identity: of the encoder; None is not checked.
          passages: `texts_fingerprint` of the passages folder; None is not checked.

        Raises:
          ValueError: there is no finished index, or it was built with another encoder or from other
            passages.
          DamagedStore: manifest, records or ids are damaged.
          OSError: the storage did not answer.
        """
        store = MemoryStore.open(path, cache_bytes=0)
        if identity is not None:
            manifest.check_identity(
                f"INDEX_DIR {store.kvstore.url}", store.manifest.identity, identity
            )
        if passages is not None:
            store.check_passages(passages)
        return cls(store)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def vector_dim(self) -> int:
        """E."""
        return self.store.manifest.identity.emb_dim

    def read(self, start: int, stop: int) -> np.ndarray:
        """float16 `[stop - start, E]` of these rows.

        Raises:
          DamagedStore: bytes are missing, damaged, or belong to another shard.
          OSError: the storage did not answer.
        """
        return self.store.read_packed(start, stop)["states"]
