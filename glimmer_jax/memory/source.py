"""The passages of one shard as the build reads them, and what is remembered of them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Passages(Protocol):
    """What the build reads; see `glimmer_jax.passages`."""

    ids: np.ndarray  # int64 [n]

    def __len__(self) -> int: ...
    def lengths(self, rows: np.ndarray) -> np.ndarray: ...
    def tokens(self, rows: np.ndarray, length: int) -> np.ndarray: ...
    def text(self, row: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Passages of one shard, in its order."""

    ids: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int32 [n, max_length], padded with 0
    lengths: np.ndarray  # int64 [n]
    titles: list[str]
    digests: np.ndarray  # uint64 [n]: id, title, uncut length and tokens, in 8 bytes of SHA-256
    truncated: int

    @property
    def sha256(self) -> str:
        """Of all of it; two shards of equal passages are equal here."""
        return hashlib.sha256(self.digests.astype("<u8").tobytes()).hexdigest()


def read_source(passages: Passages, rows: np.ndarray, max_length: int) -> Source:
    """Reads the passages `rows`, cut to `max_length` tokens."""
    full = np.asarray(passages.lengths(rows), np.int64)
    ids = np.asarray(passages.ids, np.int64)[rows]
    lengths = np.minimum(full, max_length)
    tokens = np.ascontiguousarray(passages.tokens(rows, max_length), dtype=np.int32)
    titles = [str(passages.text(int(row))["title"]) for row in rows]
    digests = np.empty(len(rows), np.uint64)
    for i, title in enumerate(titles):
        digest = hashlib.sha256(np.array([ids[i], full[i]], "<i8").tobytes())
        digest.update(tokens[i, : lengths[i]].astype("<i4").tobytes())
        # As JSON, because a title may hold half of a surrogate pair.
        digest.update(json.dumps(title).encode("ascii"))
        digests[i] = int.from_bytes(digest.digest()[:8], "little")
    return Source(ids, tokens, lengths, titles, digests, int((full > max_length).sum()))
