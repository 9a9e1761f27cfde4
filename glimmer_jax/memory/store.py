"""The memory store, read: passage ids to rows, rows to the codec's arrays.

`MemoryStore.open` reads the manifest and the index (ids and lengths of all passages, some 16 bytes
each); token states are read when asked for, only the chunks that are needed, each checked against
its crc32c. See `manifest` for the layout of the folder.
"""

import json
from collections.abc import Iterator
from typing import Literal

import numpy as np
import tensorstore as ts

from glimmer_jax import codecs
from glimmer_jax.memory import manifest, shard, versions
from glimmer_jax.memory.manifest import DamagedStore, Manifest, Shard
from glimmer_jax.storage import folder

# How many shards' files are opened at a time.
_OPEN_AT_ONCE = 64

Arrays = dict[str, np.ndarray]


class MemoryStore:
    """One version of a finished memory store, open for reading.

    Many readers may share a store, also while it is changed: shards of a version stay as they are.

    Attributes:
      path: where it was opened.
      kvstore: its folder.
      manifest: what the store is and how it was built.
      ids: int64 `[n]`, external passage id of each row, withdrawn ones included.
      lengths: int32 `[n]`, tokens of each row; 0 where it is withdrawn.
    """

    def __init__(self, path: folder.Path, kvstore: ts.KvStore, manifest_: Manifest, context):
        self.path = path
        self.manifest = manifest_
        self.kvstore = kvstore
        self._context = context
        self._specs = codecs.get(manifest_.identity.codec).array_specs(manifest_.identity.emb_dim)
        self._open: dict[tuple[str, str], ts.TensorStore] = {}
        self._first_rows = np.array([s.first_row for s in manifest_.shards], np.int64)
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
    ) -> "MemoryStore":
        """Opens the store at `path`.

        Args:
          path: a local folder, a TensorStore URL such as `gs://bucket/memory/`, or a spec.
          encoder_fingerprint: of the checkpoint that will read this memory, if known.
          vocabulary_fingerprint: likewise.
          cache_bytes: RAM for chunks that were read before.
          version: an earlier version of the store; default: the newest.

        Raises:
          ValueError: there is no finished store or no such version, it has another format version,
            or it was made by another encoder or with another vocabulary.
          DamagedStore: manifest or index are damaged.
          OSError: the storage did not answer, or refused; the same of every method that reads.
        """
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        kvstore = folder.open_folder(path, context)
        found = versions.read_manifest(kvstore, version)
        made = found.identity
        manifest.check_fingerprint("encoder", made.encoder_fingerprint, encoder_fingerprint, path)
        manifest.check_fingerprint(
            "vocabulary", made.vocabulary_fingerprint, vocabulary_fingerprint, path
        )
        return cls(path, kvstore, found, context)

    def __len__(self) -> int:
        return self.manifest.num_passages

    def check_passages(self, fingerprint: str) -> None:
        """Refuses passages with `fingerprint.passages_fingerprint` other than the memory's own."""
        manifest.check_passages(self.manifest.passages_fingerprints, fingerprint, self.path)

    def _shard_kvstore(self, name: str) -> ts.KvStore:
        return folder.subfolder(self.kvstore, manifest.shard_folder(name))

    def _failed(self, name: str, error: ValueError) -> DamagedStore | OSError:
        return shard.failed(name, self._shard_kvstore(name), error)

    def _read_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, first token within the shard, and length, of all rows."""
        # Put together from what is there: a manifest may promise more than fits into memory.
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
            (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        ]
        table = self.manifest.shards
        for block in range(0, len(table), _OPEN_AT_ONCE):
            entries = table[block : block + _OPEN_AT_ONCE]
            opening = [
                [shard.open_array(self._shard_kvstore(e.name), name, self._context)]
                for e in entries
                for name in (shard.IDS, shard.OFFSETS)
            ]
            for i, entry in enumerate(entries):
                try:
                    shard_ids, offsets = (
                        opening[2 * i + j][0].result().read().result() for j in (0, 1)
                    )
                except ValueError as error:
                    raise self._failed(entry.name, error) from error
                if (
                    shard_ids.shape != (entry.passages,)
                    or offsets.shape != (entry.passages + 1,)
                    or (offsets[0], offsets[-1]) != (0, entry.tokens)
                    or (np.diff(offsets) < 0).any()
                ):
                    raise shard.damaged(entry.name, "its index does not fit the manifest")
                parts.append((shard_ids, offsets[:-1], np.diff(offsets)))
        ids, starts, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return ids, starts, lengths.astype(np.int32)

    def rows(self, ids: np.ndarray, unknown: Literal["error", "mask"] = "error") -> np.ndarray:
        """External ids `[...]` -> int32 rows of the same shape; id -1 (no passage) gives row -1.

        Args:
          ids: integers of any shape.
          unknown: what to do with an id the store does not have; "mask" gives row -1, so the
            caller can count those with `(rows < 0) & (ids >= 0)`.

        Raises:
          ValueError: an id is unknown and `unknown` is "error".
        """
        if unknown not in ("error", "mask"):
            raise ValueError(f"unknown must be 'error' or 'mask', got {unknown!r}.")
        ids = np.asarray(ids, np.int64)
        if not len(self._order):
            found, rows = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.int64)
        else:
            at = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self._order) - 1)
            found, rows = self._sorted_ids[at] == ids, self._order[at]
        missing = np.unique(ids[~found & (ids != -1)])
        if missing.size and unknown == "error":
            withdrawn = int(np.isin(missing, self.ids[list(self.manifest.withdrawn)]).sum())
            raise ValueError(
                f"{missing.size} passage ids are not in the memory store {self.path}"
                f"{f' ({withdrawn} of them withdrawn)' if withdrawn else ''}: "
                f"{missing[:10].tolist()}. The examples were retrieved from other passages: build "
                "the memory of those, retrieve again, or answer without them (UNKNOWN_PASSAGES = 'mask')."
            )
        return np.where(found, rows, -1).astype(np.int32)

    def check_length(self, length: int) -> None:
        """Refuses a passage length that would cut stored passages short."""
        if length < self.manifest.longest:
            raise ValueError(
                f"The memory store {self.path} has passages of up to {self.manifest.longest} "
                f"tokens, and passages of {length} tokens were asked for. Raise the passage length "
                "in TASK_FEATURE_LENGTHS, or build the memory with that max_length."
            )

    def read(self, rows: np.ndarray, length: int) -> tuple[Arrays, np.ndarray]:
        """The memory of some passages.

        Args:
          rows: integers `[n]`; -1 is an absent passage. Repetitions are read once.
          length: tokens to pad to, P.

        Returns:
          The codec's arrays `[n, length, ...]`, zero beyond each passage, and int32 lengths `[n]`.

        Raises:
          ValueError: a row does not exist, or `length` is shorter than a passage.
          DamagedStore: a chunk is missing or fails its checksum.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        if rows.size and not -1 <= rows.min() <= rows.max() < len(self):
            raise ValueError(
                f"Rows go from -1 (none) to {len(self) - 1} in the memory store {self.path}; got "
                f"{rows.min()} to {rows.max()}."
            )
        present = rows >= 0
        lengths = np.zeros(len(rows), np.int32)
        lengths[present] = self.lengths[rows[present]]
        if lengths.size and lengths.max() > length:
            self.check_length(length)
        out = {
            name: np.zeros((len(rows), length, *trailing), dtype)
            for name, (trailing, dtype) in self._specs.items()
        }
        wanted = np.unique(rows[present])
        places = np.argsort(rows, kind="stable")
        sorted_rows = rows[places]
        for first, last, data in self._read_runs(wanted):
            begin = self._starts[first]
            for at in range(*np.searchsorted(sorted_rows, [first, last])):
                row = sorted_rows[at]
                start = self._starts[row] - begin
                for name, values in data.items():
                    out[name][places[at], : self.lengths[row]] = values[
                        start : start + self.lengths[row]
                    ]
        return out, lengths

    def _read_runs(self, wanted: np.ndarray) -> Iterator[tuple[int, int, Arrays]]:
        """Neighbouring rows are read as one; first row, last row + 1, arrays `[tokens, ...]`."""
        if not wanted.size:
            return
        shard_of = np.searchsorted(self._first_rows, wanted, side="right") - 1
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (np.diff(shard_of) != 0)) + 1
        # A batch lets TensorStore read a shard's index once and join neighbouring chunks.
        pending = []
        with ts.Batch() as batch:
            for run in np.split(np.arange(len(wanted)), breaks):
                entry = self.manifest.shards[shard_of[run[0]]]
                first, last = int(wanted[run[0]]), int(wanted[run[-1]]) + 1
                tokens = slice(
                    int(self._starts[first]), int(self._starts[last - 1] + self.lengths[last - 1])
                )
                if tokens.start == tokens.stop:
                    continue
                reads = {
                    name: self._array(entry, name)[tokens].read(batch=batch) for name in self._specs
                }
                pending.append((entry.name, first, last, reads))
        for name, first, last, reads in pending:
            try:
                data = {key: read.result() for key, read in reads.items()}
            except ValueError as error:
                raise self._failed(name, error) from error
            yield first, last, data

    def _array(self, entry: Shard, name: str) -> ts.TensorStore:
        key = (entry.name, name)
        if key not in self._open:
            try:
                opened = shard.open_array(
                    self._shard_kvstore(entry.name), name, self._context
                ).result()
            except ValueError as error:
                raise self._failed(entry.name, error) from error
            # Chunks carry checksums; what says how many there are, and of what, does not.
            if name in self._specs:
                trailing, dtype = self._specs[name]
                if (opened.shape, opened.dtype.numpy_dtype) != ((entry.tokens, *trailing), dtype):
                    raise shard.damaged(entry.name, f"{name} does not fit the manifest")
            self._open[key] = opened
        return self._open[key]

    def pages(self, rows_per_page: int, length: int) -> Iterator[tuple[Arrays, np.ndarray]]:
        """All rows in order, `rows_per_page` at a time, as `read` returns them."""
        for start in range(0, len(self), rows_per_page):
            yield self.read(np.arange(start, min(start + rows_per_page, len(self))), length)

    def _read_whole(self, entry: Shard, name: str) -> np.ndarray:
        """One of a shard's small arrays."""
        array = self._array(entry, name)
        try:
            return array.read().result()
        except ValueError as error:
            raise self._failed(entry.name, error) from error

    def titles(self, entry: Shard) -> list[str]:
        """Titles of one shard's passages, in the order of its rows."""
        try:
            titles = json.loads(self._read_whole(entry, shard.TITLES).tobytes())
        except json.JSONDecodeError:
            titles = []
        if len(titles) != entry.passages:
            raise shard.damaged(entry.name, "its titles do not fit the manifest")
        return titles

    def title(self, row: int) -> str:
        """Title of one passage."""
        entry = self.manifest.shards[np.searchsorted(self._first_rows, row, side="right") - 1]
        return self.titles(entry)[row - entry.first_row]

    def digests(self) -> np.ndarray:
        """uint64 `[n]`, see `source.Source`: what each row was made from, in eight bytes."""
        parts = [np.zeros(0, np.uint64)]
        for entry in self.manifest.shards:
            parts.append(self._read_whole(entry, shard.DIGESTS))
            if parts[-1].shape != (entry.passages,):
                raise shard.damaged(entry.name, "its digests do not fit the manifest")
        return np.concatenate(parts)
