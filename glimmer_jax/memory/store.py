"""Reading a memory store: passage ids to rows, rows to the codec's arrays.

`MemoryStore.open` reads the manifest and, of each shard, the record and the index (ids and lengths, 16
bytes per passage). Token states are read on demand: only the chunks that hold them, each checked
against its crc32c. `manifest` describes the folder, `shard` how bytes are bound to the manifest.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import tensorstore as ts

from glimmer_jax import codecs
from glimmer_jax.corpus.ids import describe_numbers
from glimmer_jax.memory import manifest, versions
from glimmer_jax.memory.manifest import Manifest, Record, Shard
from glimmer_jax.memory.shard import ShardReader
from glimmer_jax.storage import folder

# Shards whose files are requested at the same time while a store is opened.
_CONCURRENT_SHARDS = 64

Arrays = dict[str, np.ndarray]


class MemoryStore:
    """One version of a finished memory store, open for reading.

    Any number of readers may share a store, also while it is changed: the shards of a version never
    change.

    Attributes:
      path: where it was opened.
      kvstore: its folder.
      manifest: of this version.
      ids: int64 `[n]`, external passage id of each row, withdrawn ones included.
      lengths: int32 `[n]`, tokens of each row; 0 where it is withdrawn.
    """

    def __init__(self, path: folder.Path, kvstore: ts.KvStore, manifest_: Manifest, context):
        self.path = path
        self.manifest = manifest_
        self.kvstore = kvstore
        self._context = context
        self._specs = codecs.get(manifest_.identity.codec).array_specs(manifest_.identity.emb_dim)
        self._first_rows = np.array([s.first_row for s in manifest_.shards], np.int64)
        self._readers: list[ShardReader] = []
        self.ids, self._starts, self.lengths = self._read_index()
        withdrawn = np.array(manifest_.withdrawn, np.int64)
        self.lengths[withdrawn] = 0
        live = np.setdiff1d(np.arange(len(self)), withdrawn)
        self._order = live[np.argsort(self.ids[live], kind="stable")]
        self._sorted_ids = self.ids[self._order]

    @classmethod
    def open(
        cls,
        path: folder.Path,
        encoder_fingerprint: str | None = None,
        vocabulary_fingerprint: str | None = None,
        cache_bytes: int = 256 << 20,
        version: int | None = None,
        codec: str | None = None,
    ) -> "MemoryStore":
        """Opens the store at `path`.

        Args:
          path: a local folder, a TensorStore URL such as `gs://bucket/memory/`, or a spec.
          encoder_fingerprint: of the checkpoint that will read this memory; None is not checked.
          vocabulary_fingerprint: likewise.
          cache_bytes: RAM for chunks that were read before.
          version: an earlier version of the store; default: the newest.
          codec: `MEMORY_CODEC` of the model that will read this memory; None is not checked.

        Raises:
          ValueError: there is no finished store or no such version, it has another format version,
            or it was built by another encoder, with another vocabulary or with another codec.
          DamagedStore: manifest, records or index are damaged or do not belong together.
          OSError: the storage did not answer; so do all methods that read.
        """
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        kvstore = folder.open_folder(path, context)
        stored = versions.read_manifest(kvstore, version)
        identity = stored.identity
        manifest.check_fingerprint(
            "encoder", identity.encoder_fingerprint, encoder_fingerprint, path
        )
        manifest.check_fingerprint(
            "vocabulary", identity.vocabulary_fingerprint, vocabulary_fingerprint, path
        )
        if codec is not None and codec != identity.codec:
            raise ValueError(
                f"MEMORY_CODEC is {codec!r}, but the memory store {path} was built with "
                f"{identity.codec!r}. Set MEMORY_CODEC = {identity.codec!r}, or rebuild the memory "
                f"with {codec!r}."
            )
        return cls(path, kvstore, stored, context)

    def __len__(self) -> int:
        return self.manifest.num_passages

    def check_passages(self, fingerprint: str) -> None:
        """Raises ValueError for passages that the memory was not built from.

        Args:
          fingerprint: `fingerprint.passages_fingerprint` of the passages folder.
        """
        manifest.check_passages(self.manifest.passages_fingerprints, fingerprint, self.path)

    def check_length(self, length: int) -> None:
        """Raises ValueError for a passage length that would truncate stored passages."""
        if length < self.manifest.longest:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS allows {length} tokens per passage, but the memory store "
                f"{self.path} has passages of up to {self.manifest.longest}. Raise the passage "
                f"length to {self.manifest.longest}, or rebuild the memory with {length}."
            )

    def _read_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, first token within the shard, and length, of all rows."""
        # Concatenated from what the files hold: the manifest's counts allocate nothing.
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
            (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        ]
        shards = self.manifest.shards
        for block in range(0, len(shards), _CONCURRENT_SHARDS):
            readers = [
                ShardReader(
                    folder.subfolder(self.kvstore, manifest.shard_folder(entry.name)),
                    entry,
                    self.manifest.identity,
                    self._context,
                )
                for entry in shards[block : block + _CONCURRENT_SHARDS]
            ]
            for reader in readers:
                ids, offsets = reader.index()
                parts.append((ids, offsets[:-1], np.diff(offsets)))
            self._readers += readers
        ids, starts, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return ids, starts, lengths.astype(np.int32)

    def rows(self, ids: np.ndarray, unknown: Literal["error", "mask"] = "error") -> np.ndarray:
        """External ids `[...]` -> int32 rows of the same shape; id -1 (no passage) gives row -1.

        Args:
          ids: integers of any shape.
          unknown: what to do with an id that the store does not have; "mask" gives row -1, so that
            the caller can count them with `(rows < 0) & (ids >= 0)`.

        Raises:
          ValueError: an id is unknown and `unknown` is "error".
        """
        if unknown not in ("error", "mask"):
            raise ValueError(f"unknown must be 'error' or 'mask', got {unknown!r}.")
        ids = np.asarray(ids, np.int64)
        if not len(self._order):
            known, rows = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.int64)
        else:
            at = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self._order) - 1)
            known, rows = self._sorted_ids[at] == ids, self._order[at]
        missing = np.unique(ids[~known & (ids != -1)])
        if missing.size and unknown == "error":
            withdrawn = int(np.isin(missing, self.withdrawn_ids()).sum())
            raise ValueError(
                f"{missing.size} passage ids are not in the memory store {self.path}"
                f"{f' ({withdrawn} of them withdrawn)' if withdrawn else ''}: "
                f"{describe_numbers(missing)}. The examples were retrieved from other passages: build "
                "the memory of those passages, retrieve again, or mask them with "
                "UNKNOWN_PASSAGES = 'mask'."
            )
        return np.where(known, rows, -1).astype(np.int32)

    def withdrawn_ids(self) -> np.ndarray:
        """int64, ids of withdrawn rows; an id may be valid again in a later row."""
        return self.ids[list(self.manifest.withdrawn)]

    def read(self, rows: np.ndarray, length: int) -> tuple[Arrays, np.ndarray]:
        """The memory of some passages.

        Args:
          rows: integers `[n]`; -1 is an absent passage. Repeated rows are read once.
          length: tokens to pad to, P.

        Returns:
          The codec's arrays `[n, length, ...]`, zero beyond each passage, and int32 lengths `[n]`.

        Raises:
          ValueError: a row does not exist, or `length` is shorter than a passage.
          DamagedStore: bytes are missing, damaged, or belong to another shard.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        self._check_rows(rows)
        present = rows >= 0
        lengths = np.zeros(len(rows), np.int32)
        lengths[present] = self.lengths[rows[present]]
        if lengths.size and lengths.max() > length:
            self.check_length(length)
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        # Opened before anything is allocated: their sizes are checked then.
        runs = self._start_reads(np.unique(rows[present]))
        out = {
            name: np.zeros((len(rows), length, *trailing), dtype)
            for name, (trailing, dtype) in self._specs.items()
        }
        for first, last, data in runs:
            begin = self._starts[first]
            for at in range(*np.searchsorted(sorted_rows, [first, last])):
                row = sorted_rows[at]
                start = self._starts[row] - begin
                for name, values in data.items():
                    out[name][order[at], : self.lengths[row]] = values[
                        start : start + self.lengths[row]
                    ]
        return out, lengths

    def read_packed(self, first: int, last: int) -> Arrays:
        """The codec's arrays of rows `[first, last)`, `[tokens, ...]`, without padding.

        Raises as `read` does. Tokens of withdrawn rows may be included.
        """
        rows = np.arange(first, last)
        self._check_rows(rows)
        runs = list(self._start_reads(rows))
        return {
            name: np.concatenate(
                [np.zeros((0, *trailing), dtype), *(data[name] for _, _, data in runs)]
            )
            for name, (trailing, dtype) in self._specs.items()
        }

    def passages(self, first: int, last: int) -> Iterator[tuple[int, Arrays]]:
        """Rows `[first, last)` in order, each with the codec's arrays `[its tokens, ...]`.

        Raises as `read` does. Withdrawn rows and rows without tokens are left out.
        """
        rows = np.arange(first, last)
        self._check_rows(rows)
        for begin, end, data in self._start_reads(rows):
            for row in range(begin, end):
                start = self._starts[row] - self._starts[begin]
                tokens = slice(start, start + self.lengths[row])
                if self.lengths[row]:
                    yield row, {name: values[tokens] for name, values in data.items()}

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.size and not -1 <= rows.min() <= rows.max() < len(self):
            raise ValueError(
                f"Rows of the memory store {self.path} are -1 (none) to {len(self) - 1}; got "
                f"{rows.min()} to {rows.max()}."
            )

    def _start_reads(self, rows: np.ndarray) -> Iterator[tuple[int, int, Arrays]]:
        """Reads increasing `rows`, neighbours together: first row, last row + 1, `[tokens, ...]`."""
        if not rows.size:
            return iter(())
        shard_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard_of) != 0)) + 1
        # A batch lets TensorStore read the index of a shard once and join neighbouring chunks.
        pending = []
        with ts.Batch() as batch:
            for run in np.split(np.arange(len(rows)), breaks):
                reader = self._readers[shard_of[run[0]]]
                first, last = int(rows[run[0]]), int(rows[run[-1]]) + 1
                tokens = slice(
                    int(self._starts[first]), int(self._starts[last - 1] + self.lengths[last - 1])
                )
                if tokens.start == tokens.stop:
                    continue
                reads = {name: reader.array(name)[tokens].read(batch=batch) for name in self._specs}
                pending.append((reader, first, last, reads))

        def results() -> Iterator[tuple[int, int, Arrays]]:
            for reader, first, last, reads in pending:
                try:
                    data = {key: read.result() for key, read in reads.items()}
                except ValueError as error:
                    raise reader.error(error) from error
                yield first, last, data

        return results()

    def records(self) -> Iterator[Record]:
        """The record of each shard, in order."""
        return (reader.record for reader in self._readers)

    def titles(self, entry: Shard) -> list[str]:
        """Titles of the passages of one shard, in the order of its rows. Raises DamagedStore."""
        return self._readers[self._shard_at(entry.first_row)].titles()

    def _shard_at(self, row: int) -> int:
        return int(np.searchsorted(self._first_rows, row, side="right")) - 1

    def digests(self) -> np.ndarray:
        """uint64 `[n]`: 8 bytes of the SHA-256 of each passage, see `source.Source`."""
        parts = [reader.digests() for reader in self._readers]
        return np.concatenate([np.zeros(0, np.uint64), *parts])
