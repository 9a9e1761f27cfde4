"""One shard: zarr v3 arrays, written whole and read in part through TensorStore.

Each array is one file: an outer chunk that covers the array, cut into inner chunks that carry a
crc32c each, as does their index. Reading a passage reads and checks only the inner chunks it lies
in. Arrays are token-major, so padding is not stored; the last inner chunk alone is filled up.

The passages of one shard as the build reads them, and what is remembered of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from glimmer_jax.memory.manifest import DamagedStore
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error


class Passages(Protocol):
    """What the build reads; see `glimmer_jax.corpus.passages`."""

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


IDS, OFFSETS, TITLES, DIGESTS = "ids", "offsets", "titles", "digests"

# A chunk that is not there is an error; hence zeros must be written like anything else.
_STRICT = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}


def _metadata(shape: Sequence[int], dtype: np.dtype, chunk_rows: int) -> dict[str, Any]:
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if dtype.itemsize == 1:
        checked[0] = {"name": "bytes"}
    chunk_rows = max(1, min(chunk_rows, shape[0]))
    outer_rows = max(-(-shape[0] // chunk_rows), 1) * chunk_rows
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk_rows, *shape[1:]], "codecs": checked, "index_codecs": index}
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [outer_rows, *shape[1:]]},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
    }


def encode_array(values: np.ndarray, chunk_rows: int) -> dict[str, bytes]:
    """The files of one array, name -> bytes."""
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    spec = {
        "driver": "zarr3",
        "kvstore": memory.spec().to_json(),
        "metadata": _metadata(values.shape, values.dtype, chunk_rows),
        **_STRICT,
    }
    # One transaction: the outer chunk is put together once, not once for each inner chunk.
    with ts.Transaction() as transaction:
        array = ts.open(spec, context=context, create=True, transaction=transaction).result()
        if values.size:
            array.write(values).result()
    names = [key.decode() for key in memory.list().result()]
    return {name: bytes(memory.read(name).result().value) for name in names}


def write_arrays(
    kvstore: ts.KvStore,
    arrays: Mapping[str, np.ndarray],
    source: Source,
    offsets: np.ndarray,
    chunk_tokens: int,
) -> dict[str, tuple[int, str]]:
    """Writes the arrays of one shard, whatever was left of an earlier attempt removed.

    Args:
      kvstore: the shard's folder.
      arrays: the codec's arrays, `[tokens, ...]`.
      source: the shard's n passages. Any title survives, one with lone surrogates too.
      offsets: int64 `[n + 1]`; passage i has tokens offsets[i] to offsets[i + 1].
      chunk_tokens: tokens of an inner chunk.

    Returns:
      path inside the shard -> (bytes, SHA-256), computed before the bytes left memory.
    """
    index = {
        IDS: np.asarray(source.ids, np.int64),
        OFFSETS: np.asarray(offsets, np.int64),
        DIGESTS: source.digests,
        TITLES: np.frombuffer(json.dumps(source.titles).encode("ascii"), np.uint8),
    }
    files: dict[str, tuple[int, str]] = {}
    pending = []
    every: dict[str, np.ndarray] = {**index, **arrays}
    try:
        kvstore.delete_range(ts.KvStore.KeyRange()).result()
        for name, values in every.items():
            chunk_rows = chunk_tokens if name in arrays else len(values)
            for key, data in encode_array(np.ascontiguousarray(values), chunk_rows).items():
                files[f"{name}/{key}"] = (len(data), hashlib.sha256(data).hexdigest())
                pending.append(kvstore.write(f"{name}/{key}", data))
        for write in pending:
            write.result()
    except ValueError as error:
        raise storage_error(kvstore.url, error) from error
    return files


def open_array(kvstore: ts.KvStore, name: str, context: ts.Context) -> ts.Future:
    """A future of array `name` of the shard in `kvstore`, open for reading."""
    spec = {
        "driver": "zarr3",
        **_STRICT,
        # A finished shard never changes under a reader.
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
    }
    # The store itself, not its JSON, which would lose its retries and credentials.
    here = folder.subfolder(kvstore, name)
    return ts.open(spec, kvstore=here, context=context, open=True, read=True)


def check_files(kvstore: ts.KvStore, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Reads every byte; what is wrong, a line each."""
    problems = []
    for name, (size, sha256) in sorted(files.items()):
        data = folder.read_file(kvstore, name)
        if data is None:
            problems.append(f"{name} is missing")
        elif len(data) != size:
            problems.append(f"{name} has {len(data)} bytes instead of {size}")
        elif hashlib.sha256(data).hexdigest() != sha256:
            problems.append(f"{name} has been changed: its SHA-256 differs")
    return problems


def check_sizes(kvstore: ts.KvStore, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Whether every file is there and reaches its last byte, without reading the rest.

    Raises:
      OSError: the storage did not answer, so nothing is known of the file.
    """
    reads = {
        name: kvstore.read(name, byte_range=slice(size - 1, size))
        for name, (size, _) in files.items()
    }
    problems = []
    for name, read in sorted(reads.items()):
        try:
            if read.result().state == "missing":
                problems.append(f"{name} is missing")
        except ValueError as error:
            if not folder.is_damage(error):
                raise storage_error(f"{kvstore.url}{name}", error) from error
            problems.append(f"{name} is shorter than {files[name][0]} bytes")
    return problems


def failed(name: str, kvstore: ts.KvStore, error: ValueError) -> DamagedStore | OSError:
    """The error to raise where TensorStore failed to read shard `name` with `error`."""
    if folder.is_damage(error):
        return damaged(name, str(error))
    return storage_error(kvstore.url, error)


def damaged(name: str, problem: str) -> DamagedStore:
    """The error to raise where the bytes of shard `name` are wrong."""
    return DamagedStore(
        f"Shard {name} of the memory store is damaged: {problem}. Repair it with --run_mode=memory "
        f"--action=repair, or delete the folder shards/{name} and run the same build_memory command "
        "again; it rebuilds that shard alone."
    )
