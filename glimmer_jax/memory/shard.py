"""One shard: from passages to zarr v3 arrays, and back.

Each array is one file: an outer chunk that covers the array, divided into inner chunks. Every inner
chunk has a crc32c, and so has the index of chunks at the end of the file. Reading a passage reads
and checks only the inner chunks that hold it. Arrays are token-major, so padding is not stored,
except in the last inner chunk.

A crc32c does not tell to which shard a chunk belongs. Three things bind the bytes that are read to
the manifest. `shard.json` must have the SHA-256 that the manifest names. The small arrays (ids,
offsets, titles, digests) are read completely and must have the SHA-256 of the record. The codec's
arrays are too large for that: their files carry a seal, the SHA-256 of their chunks, between the
last chunk and the index, where zarr readers see unused bytes. The seal is compared with the record
when an array is opened.

Shapes, dtypes and chunks follow from the manifest. The `zarr.json` files are written for other
readers and never read here, so damaged or hostile metadata cannot make a read allocate memory.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from glimmer_jax import codecs
from glimmer_jax.memory.manifest import RECORD, DamagedStore, Identity, Record, Shard
from glimmer_jax.memory.source import Source
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error

IDS, OFFSETS, TITLES, DIGESTS = "ids", "offsets", "titles", "digests"

_SEAL_BYTES = 32
# Size of the checksum of an inner chunk and of the index.
_CRC_BYTES = 4
_INDEX_ENTRY_BYTES = 16

# A missing chunk is an error; hence chunks of zeros must be written.
_STRICT = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}


@dataclasses.dataclass(frozen=True)
class ArrayFormat:
    """Shape, dtype and chunks of one array, from which its metadata and its file's size follow."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int

    @classmethod
    def of(cls, shape: Sequence[int], dtype: np.dtype, chunk_rows: int) -> "ArrayFormat":
        """Chunks of at most `chunk_rows` rows."""
        return cls(tuple(shape), np.dtype(dtype), max(1, min(chunk_rows, shape[0])))

    @property
    def _chunks(self) -> int:
        return max(-(-self.shape[0] // self.chunk_rows), 1)

    @property
    def index_bytes(self) -> int:
        """Size of the index at the end of the file."""
        return self._chunks * _INDEX_ENTRY_BYTES + _CRC_BYTES

    @property
    def chunks_bytes(self) -> int:
        """Size of all inner chunks with their checksums."""
        row_bytes = functools.reduce(lambda a, b: a * b, self.shape[1:], self.dtype.itemsize)
        return self._chunks * (self.chunk_rows * row_bytes + _CRC_BYTES)

    @property
    def data_file(self) -> str:
        """Name of the one data file, inside the folder of the array."""
        return "/".join(["c", *("0" for _ in self.shape)])

    def metadata(self) -> dict[str, Any]:
        """Zarr v3 metadata."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = {"name": "bytes"} if self.dtype.itemsize == 1 else little
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.shape[1:]],
            "codecs": [inner, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
        }
        outer = [self._chunks * self.chunk_rows, *self.shape[1:]]
        return {
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "fill_value": 0,
        }


def encode_array(values: np.ndarray, format_: ArrayFormat) -> dict[str, bytes]:
    """The files of one array, name -> bytes."""
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    spec = {
        "driver": "zarr3",
        "kvstore": memory.spec().to_json(),
        "metadata": format_.metadata(),
        **_STRICT,
    }
    # One transaction: the outer chunk is assembled once, not once for each inner chunk.
    with ts.Transaction() as transaction:
        array = ts.open(spec, context=context, create=True, transaction=transaction).result()
        if values.size:
            array.write(values).result()
    names = [key.decode() for key in memory.list().result()]
    return {name: bytes(memory.read(name).result().value) for name in names}


def _seal(data: bytes, format_: ArrayFormat) -> tuple[bytes, str]:
    """The file with its seal before the index, and the seal."""
    index_start = len(data) - format_.index_bytes
    chunks, index = memoryview(data)[:index_start], memoryview(data)[index_start:]
    seal = hashlib.sha256(chunks)
    return b"".join([chunks, seal.digest(), index]), seal.hexdigest()


def write_arrays(
    kvstore: ts.KvStore,
    arrays: Mapping[str, np.ndarray],
    source: Source,
    offsets: np.ndarray,
    chunk_tokens: int,
) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """Writes the arrays of one shard, after removing what an earlier attempt left.

    Args:
      kvstore: folder of the shard.
      arrays: the codec's arrays, `[tokens, ...]`.
      source: the shard's n passages. Titles may contain anything, also lone surrogates.
      offsets: int64 `[n + 1]`; passage i has tokens offsets[i] to offsets[i + 1].
      chunk_tokens: tokens of an inner chunk.

    Returns:
      `files` and `seals` of the record, computed before the bytes leave memory.

    Raises:
      OSError: the storage failed.
    """
    small = {
        IDS: np.asarray(source.ids, np.int64),
        OFFSETS: np.asarray(offsets, np.int64),
        DIGESTS: source.digests,
        TITLES: np.frombuffer(json.dumps(source.titles).encode("ascii"), np.uint8),
    }
    files: dict[str, tuple[int, str]] = {}
    seals: dict[str, str] = {}
    pending = []
    contents: dict[str, np.ndarray] = {**small, **arrays}
    try:
        kvstore.delete_range(ts.KvStore.KeyRange()).result()
        for name, values in contents.items():
            chunk_rows = len(values) if name in small else chunk_tokens
            format_ = ArrayFormat.of(values.shape, values.dtype, chunk_rows)
            for key, data in encode_array(np.ascontiguousarray(values), format_).items():
                if name in arrays and key == format_.data_file:
                    data, seals[name] = _seal(data, format_)
                files[f"{name}/{key}"] = (len(data), hashlib.sha256(data).hexdigest())
                pending.append(kvstore.write(f"{name}/{key}", data))
        for write in pending:
            write.result()
    except ValueError as error:
        raise storage_error(kvstore.url, error) from error
    return files, seals


class ShardReader:
    """Reads one finished shard; all bytes that it returns are bound to the manifest.

    Creating a reader starts to read the record, ids and offsets, so that many readers can be
    created before the first one is used.
    """

    def __init__(self, kvstore: ts.KvStore, entry: Shard, identity: Identity, context: ts.Context):
        """Starts to read.

        Args:
          kvstore: folder of the shard.
          entry: of the manifest.
          identity: of the manifest.
          context: holds the cache of chunks.
        """
        self.entry = entry
        self._kvstore = kvstore
        self._identity = identity
        self._context = context
        self._arrays: dict[str, ts.TensorStore] = {}
        self._reads = {name: self._read(name) for name in (RECORD, _file(IDS), _file(OFFSETS))}

    @functools.cached_property
    def record(self) -> Record:
        """The record that the manifest names.

        Raises:
          DamagedStore: it is missing, or another one.
          OSError: the storage did not answer; so do all other methods.
        """
        data = self._bytes(RECORD)
        if hashlib.sha256(data).hexdigest() != self.entry.record_sha256:
            raise self._damaged(
                f"{RECORD} is not the one that the manifest names: its SHA-256 differs"
            )
        record = Record.from_bytes(data, f"{self._kvstore.url}{RECORD}")
        for name, format_ in self._formats().items():
            size, _ = record.files.get(f"{name}/{format_.data_file}", (None, None))
            sealed = format_.chunks_bytes + _SEAL_BYTES + format_.index_bytes
            if self.entry.tokens and (size != sealed or name not in record.seals):
                raise self._damaged(
                    f"{name} needs a file of {sealed} bytes by the manifest, but the record names "
                    f"{size}"
                )
        return record

    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 ids `[n]` and offsets `[n + 1]`: passage i has tokens offsets[i] to offsets[i + 1].

        Raises DamagedStore if they are missing, changed, or do not fit the manifest.
        """
        n = self.entry.passages
        ids, offsets = self._small(IDS, np.int64), self._small(OFFSETS, np.int64)
        lengths = np.diff(offsets)
        if (
            (ids.shape, offsets.shape) != ((n,), (n + 1,))
            or (offsets[0], offsets[-1]) != (0, self.entry.tokens)
            or lengths.min(initial=0) < 0
            or lengths.max(initial=0) > self.entry.longest
        ):
            raise self._damaged("its ids and offsets do not fit the manifest")
        return ids, offsets

    def titles(self) -> list[str]:
        """Titles of the passages. Raises DamagedStore."""
        try:
            titles = json.loads(self._small(TITLES, np.uint8).tobytes())
        except json.JSONDecodeError:
            titles = None
        if not isinstance(titles, list) or len(titles) != self.entry.passages:
            raise self._damaged("its titles do not fit the manifest")
        return titles

    def digests(self) -> np.ndarray:
        """uint64 `[n]`, see `Source.digests`. Raises DamagedStore."""
        digests = self._small(DIGESTS, np.uint64)
        if digests.shape != (self.entry.passages,):
            raise self._damaged("its digests do not fit the manifest")
        return digests

    def array(self, name: str) -> ts.TensorStore:
        """A codec array `[tokens, ...]`; its seal is checked when it is first used.

        Raises DamagedStore if its file is missing or belongs to another shard. Errors of reading
        the array go through `error`.
        """
        if name not in self._arrays:
            format_ = self._formats()[name]
            seal = self._read_range(
                f"{name}/{format_.data_file}", format_.chunks_bytes, _SEAL_BYTES
            )
            if seal.hex() != self.record.seals[name]:
                raise self._damaged(
                    f"the file of {name} is not the one that was built: seal differs"
                )
            try:
                opened = open_array(self._kvstore, name, format_, self._context).result()
            except ValueError as error:
                raise self.error(error) from error
            self._arrays[name] = opened
        return self._arrays[name]

    def error(self, error: ValueError) -> DamagedStore | OSError:
        """The error to raise where TensorStore failed with `error`."""
        if folder.is_damage(error):
            return self._damaged(str(error))
        return storage_error(self._kvstore.url, error)

    def _formats(self) -> dict[str, ArrayFormat]:
        codec, tokens = codecs.get(self._identity.codec), self.entry.tokens
        return {
            name: ArrayFormat.of((tokens, *trailing), dtype, self.entry.layout.chunk_tokens)
            for name, (trailing, dtype) in codec.array_specs(self._identity.emb_dim).items()
        }

    def _small(self, name: str, dtype: Any) -> np.ndarray:
        """An array of one inner chunk, read completely."""
        data = self._bytes(_file(name))
        size, sha256 = self.record.files.get(_file(name), (0, ""))
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise self._damaged(f"{_file(name)} has been changed: its SHA-256 differs")
        return _values_of_one_chunk(data, dtype)

    def _read(self, file: str, **options: Any) -> ts.Future:
        if options:
            folder.reject_special_files(self._kvstore, file)
        else:
            folder.check_small(self._kvstore, file)
        return self._kvstore.read(file, **options)

    def _bytes(self, file: str) -> bytes:
        try:
            read = self._reads.pop(file, None) or self._read(file)
            result = read.result()
        except ValueError as error:
            raise storage_error(f"{self._kvstore.url}{file}", error) from error
        if result.state == "missing":
            raise self._damaged(f"{file} is missing")
        return bytes(result.value)

    def _read_range(self, file: str, start: int, count: int) -> bytes:
        try:
            result = self._read(file, byte_range=slice(start, start + count)).result()
        except ValueError as error:
            raise self.error(error) from error
        if result.state == "missing":
            raise self._damaged(f"{file} is missing")
        return bytes(result.value)

    def _damaged(self, problem: str) -> DamagedStore:
        name = self.entry.name
        return DamagedStore(
            f"Shard {name} of the memory store is damaged: {problem}. Repair it with "
            f"--run_mode=memory --action=repair, or delete the folder shards/{name} and rerun the "
            "command that built the store; only this shard is rebuilt."
        )


def _file(name: str) -> str:
    """The data file of a small array."""
    return f"{name}/c/0"


def _values_of_one_chunk(data: bytes, dtype: Any) -> np.ndarray:
    """The values in a data file of one inner chunk: values, their crc32c, index of one entry."""
    end = len(data) - (_CRC_BYTES + _INDEX_ENTRY_BYTES + _CRC_BYTES)
    dtype = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(data, dtype, count=max(end, 0) // dtype.itemsize)


def open_array(
    kvstore: ts.KvStore, name: str, format_: ArrayFormat, context: ts.Context
) -> ts.Future:
    """A future of array `name` of the shard in `kvstore`, open for reading by `format_` alone."""
    spec = {
        "driver": "zarr3",
        "metadata": format_.metadata(),
        **_STRICT,
        # A finished shard never changes under a reader.
        "recheck_cached_data": "open",
        "recheck_cached_metadata": "open",
    }
    # The store itself: its JSON would lose retries and credentials.
    here = folder.subfolder(kvstore, name)
    return ts.open(spec, kvstore=here, context=context, open=True, read=True, assume_metadata=True)


def check_files(kvstore: ts.KvStore, files: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """Reads every byte; problems by file."""
    problems = {}
    for name, (size, sha256) in sorted(files.items()):
        data = folder.read_file(kvstore, name, size)
        found = folder.local_size(kvstore, name) if data is None else len(data)
        if found is None:
            problems[name] = f"{name} is missing"
        elif data is None or found != size:
            problems[name] = f"{name} has {found} bytes instead of {size}"
        elif hashlib.sha256(data).hexdigest() != sha256:
            problems[name] = f"{name} has been changed: its SHA-256 differs"
    return problems


def check_sizes(kvstore: ts.KvStore, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Reads the last byte of every file, so that missing and truncated files are found.

    Raises:
      OSError: the storage did not answer.
    """
    reads = {}
    for name, (size, _) in files.items():
        folder.reject_special_files(kvstore, name)
        reads[name] = kvstore.read(name, byte_range=slice(size - 1, size))
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
