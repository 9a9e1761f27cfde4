"""A dense index: one vector for each row of a passages folder, in shards of zarr v3 arrays.

    index/
      manifest.json               written last: a folder without it is an unfinished index
      shards/000000/
        shard.json                written after the vectors: whose they are, sizes and SHA-256
        vectors/ ...              zarr v3, float16 `[n, E]`, a crc32c for every `CHUNK_ROWS` rows

The ways of the memory store in small: rows are those of the passages folder, so an index needs no ids
and belongs to one folder. Every read is checked by its crc32c, and missing bytes are an error.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts

from glimmer_jax.memory import manifest, shard
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error

FORMAT_VERSION = 1
LOCK = "index.lock"
VECTORS = "vectors"
# Half of float32, eleven bits of precision: a similarity moves by about 1e-5.
DTYPE = np.dtype(np.float16)
CHUNK_ROWS = 1024

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose vectors these are."""

    encoder: str  # fingerprint of the weights
    vocabulary: str  # fingerprint of the SentencePiece model
    passages: str  # fingerprint of ids and texts
    max_length: int  # tokens of a text; longer ones were cut
    vector_dim: int  # E

    def check(self, where: Any, stored: "Identity") -> None:
        """Raises ValueError naming both sides of every difference from what is stored."""
        differences = [
            f"the {name} {getattr(stored, name)}, and here it is {getattr(self, name)}"
            for name in (field.name for field in dataclasses.fields(self))
            if getattr(stored, name) != getattr(self, name)
        ]
        if differences:
            raise ValueError(
                f"The index {where} was made with {'; '.join(differences)}. Use the encoder and the "
                "passages folder that it was made with, or make another index: set INDEX_DIR to a "
                "new folder."
            )


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished shard."""

    identity: Identity
    program: dict[str, Any]  # what encoded it: rows, buckets, dtype, backend, JAX's version
    passages: int
    truncated: int  # passages cut to max_length
    files: dict[str, tuple[int, str]]  # path inside the shard -> bytes, SHA-256

    def to_bytes(self) -> bytes:
        return folder.dump_json({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @property
    def size(self) -> int:
        """Bytes of the shard's files."""
        return sum(size for size, _ in self.files.values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished index is."""

    identity: Identity
    passages: int
    truncated: int
    size: int  # bytes of all shards' files
    shards: tuple[tuple[str, int, str], ...]  # name, passages, SHA-256 of its record; in order

    @classmethod
    def of(cls, records: dict[str, Record]) -> "Manifest":
        """The manifest of these shards, in this order. There is at least one."""
        every = list(records.values())
        return cls(
            every[0].identity,
            sum(record.passages for record in every),
            sum(record.truncated for record in every),
            sum(record.size for record in every),
            tuple(
                (name, one.passages, hashlib.sha256(one.to_bytes()).hexdigest())
                for name, one in records.items()
            ),
        )

    def to_bytes(self) -> bytes:
        return folder.dump_json({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})


def read_record(kvstore: ts.KvStore, name: str) -> Record | None:
    """The record of a finished shard, or None.

    Raises:
      ValueError: it is damaged, or of another version of the format.
      OSError: the storage did not answer.
    """
    return _read(kvstore, f"{manifest.shard_folder(name)}/{manifest.RECORD}", _record)


def read_manifest(kvstore: ts.KvStore) -> Manifest | None:
    """The manifest, or None; raises as `read_record` does."""
    return _read(kvstore, manifest.MANIFEST, _manifest)


def _record(value: dict[str, Any]) -> Record:
    files = {name: (size, sha) for name, (size, sha) in value.pop("files").items()}
    return Record(identity=Identity(**value.pop("identity")), files=files, **value)


def _manifest(value: dict[str, Any]) -> Manifest:
    shards = tuple((name, count, sha) for name, count, sha in value.pop("shards"))
    return Manifest(identity=Identity(**value.pop("identity")), shards=shards, **value)


def _read(kvstore: ts.KvStore, key: str, make: Callable[[dict[str, Any]], T]) -> T | None:
    data = folder.read_file(kvstore, key)
    if data is None:
        return None
    try:
        value = json.loads(data)
        version = value.pop("format_version")
        if version == FORMAT_VERSION:
            return make(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{kvstore.url}{key} is damaged: it is not what was written. Delete it and run the same "
            "command again; whole shards are kept."
        ) from None
    raise ValueError(
        f"{kvstore.url}{key} has format version {version}, this program reads {FORMAT_VERSION}. Make "
        "the index again in another folder."
    )


class Index:
    """A finished index, opened for reading."""

    def __init__(self, kvstore: ts.KvStore, found: Manifest):
        self.manifest = found
        self.url = kvstore.url
        self._kvstore = kvstore
        context = ts.Context()
        opened = [
            shard.open_array(self._folder(name), VECTORS, context) for name, _, _ in found.shards
        ]
        try:
            arrays = [one.result() for one in opened]
        except ValueError as error:
            raise self._failed(error) from error
        shapes = [array.shape for array in arrays]
        wanted = [(count, found.identity.vector_dim) for _, count, _ in found.shards]
        if shapes != wanted:
            raise ValueError(
                f"The index {self.url} is damaged: its shards are {shapes}, not {wanted}."
            )
        self._vectors = ts.concat(arrays, axis=0)

    @classmethod
    def open(cls, path: folder.Path, identity: Identity | None = None) -> "Index":
        """Opens an index; with `identity`, only one of that encoder and those passages.

        Raises:
          ValueError: there is no finished index, it is another's (both are named), or damaged.
        """
        kvstore = folder.open_folder(path)
        found = read_manifest(kvstore)
        if found is None:
            raise ValueError(
                f"{kvstore.url} holds no finished index. Make it with --run_mode=retrieve and "
                "RETRIEVER='dense'; an unfinished one goes on where it was."
            )
        if identity is not None:
            identity.check(kvstore.url, found.identity)
        return cls(kvstore, found)

    def __len__(self) -> int:
        return self.manifest.passages

    @property
    def vector_dim(self) -> int:
        return self.manifest.identity.vector_dim

    def read(self, start: int, stop: int) -> np.ndarray:
        """float16 `[stop - start, E]` of these rows, checked.

        Raises:
          ValueError: bytes are missing or are not those that were written.
          OSError: the storage did not answer.
        """
        try:
            return np.asarray(self._vectors[start:stop].read().result())
        except ValueError as error:
            raise self._failed(error) from error

    def verify(self) -> list[str]:
        """Reads every byte of every shard; what is wrong, a line each."""
        problems = []
        for name, _, sha in self.manifest.shards:
            record = read_record(self._kvstore, name)
            if record is None or hashlib.sha256(record.to_bytes()).hexdigest() != sha:
                problems.append(f"{name}: its record is not the one that the manifest names")
            else:
                found = shard.check_files(self._folder(name), record.files)
                problems += [f"{name}: {one}" for one in found]
        return problems

    def _folder(self, name: str) -> ts.KvStore:
        return folder.subfolder(self._kvstore, manifest.shard_folder(name))

    def _failed(self, error: ValueError) -> ValueError | OSError:
        if not folder.is_damage(error):
            return storage_error(self.url, error)
        return ValueError(
            f"The index {self.url} is damaged: {error}. Delete the folder of that shard and run the "
            "same --run_mode=retrieve command again; it makes that shard alone."
        )
