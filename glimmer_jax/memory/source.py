"""The passages of one shard, with digests that show whether two shards are equal."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np


class Passages(Protocol):
    """The corpus that a build reads; see `glimmer_jax.corpus.passages`."""

    ids: np.ndarray  # int64 [n]

    def __len__(self) -> int: ...
    def lengths(self, rows: np.ndarray) -> np.ndarray: ...
    def tokens(self, rows: np.ndarray, length: int) -> np.ndarray: ...
    def records(self, start: int, stop: int) -> Iterable[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """The n passages of one shard, in its order."""

    ids: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int32 [n, max_length], padded with 0
    lengths: np.ndarray  # int64 [n]
    titles: list[str]
    digests: np.ndarray  # uint64 [n]: id, title, full length and tokens, 8 bytes of their SHA-256
    truncated: int  # passages longer than max_length

    @property
    def sha256(self) -> str:
        """SHA-256 of the digests: equal for shards of equal passages."""
        return hashlib.sha256(self.digests.astype("<u8").tobytes()).hexdigest()


def read_source(passages: Passages, rows: np.ndarray, max_length: int) -> Source:
    """Reads the passages `rows`, truncated to `max_length` tokens."""
    full = np.asarray(passages.lengths(rows), np.int64)
    ids = np.asarray(passages.ids, np.int64)[rows]
    lengths = np.minimum(full, max_length)
    tokens = np.ascontiguousarray(passages.tokens(rows, max_length), dtype=np.int32)
    titles = _read_titles(passages, np.asarray(rows, np.int64))
    digests = np.empty(len(rows), np.uint64)
    for i, title in enumerate(titles):
        digest = hashlib.sha256(np.array([ids[i], full[i]], "<i8").tobytes())
        digest.update(tokens[i, : lengths[i]].astype("<i4").tobytes())
        # As JSON, because a title may contain a lone surrogate.
        digest.update(json.dumps(title).encode("ascii"))
        digests[i] = int.from_bytes(digest.digest()[:8], "little")
    return Source(ids, tokens, lengths, titles, digests, int((full > max_length).sum()))


def _read_titles(passages: Passages, rows: np.ndarray) -> list[str]:
    """Titles in the order of `rows`; one sequential read for each run of consecutive rows."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
    return [
        str(record["title"])
        for run in runs
        for record in passages.records(int(run[0]), int(run[-1]) + 1)
    ]
