"""What a memory store says of itself: the manifest, and one small record beside each shard.

    memory/
      manifest.json               written last: a folder without it is an unfinished build
      shards/000000/
        shard.json                written after the shard's arrays: sizes and SHA-256 of its files
        ids/ offsets/ titles/     zarr v3 arrays of the shard's passages
        states/ ...               zarr v3 arrays of the codec, `[tokens, ...]`

A shard is a range of consecutive passages and needs no other shard, so shards are built, checked,
rebuilt and added one by one, by any number of processes. Checksums form a chain: the manifest holds
the SHA-256 of each record and of itself, a record those of its files. Neither holds a time, a host
or a path, so the same build gives the same bytes.
"""

import dataclasses
import hashlib
import json
import re
from typing import Any

from glimmer_jax.memory import folder

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RECORD = "shard.json"

_SHARD_NAME = re.compile(r"[0-9a-z][0-9a-z_-]*")
_FILE_NAME = re.compile(r"[0-9a-z_]+/(zarr\.json|c(/[0-9]+)+)")


class DamagedStore(ValueError):
    """Bytes of a store are missing or are not those that were written."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device ran: two builds agree to the last bit only if this is equal."""

    rows: int  # passages in one device's batch
    buckets: tuple[int, ...]  # lengths, in tokens, that a batch may be padded to
    dtype: str  # of activations while encoding
    backend: str  # cpu, gpu or tpu
    jax_version: str

    def __post_init__(self):
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if self.rows < 1:
            raise ValueError(f"A batch needs at least one row a device, got {self.rows}.")
        increasing = all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
        if not self.buckets or self.buckets[0] < 1 or not increasing:
            raise ValueError(f"Length buckets must be increasing and positive: {self.buckets}.")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must agree for shards to belong to one store."""

    encoder_fingerprint: str
    vocabulary_fingerprint: str
    codec: str
    emb_dim: int
    max_length: int  # tokens; longer passages were cut to it
    shard_passages: int  # passages in each shard but the last
    chunk_tokens: int  # tokens in the smallest unit that is read and checksummed


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished shard."""

    identity: Identity
    program: Program
    first_row: int
    passages: int
    tokens: int
    truncated: int  # passages cut to max_length
    longest: int  # tokens of the longest passage
    source_sha256: str  # of the passages it was made from: ids, titles and tokens
    files: dict[str, tuple[int, str]]  # path inside the shard -> bytes, SHA-256

    def to_bytes(self) -> bytes:
        return folder.dump_json({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Record":
        """Raises DamagedStore if this is not a record of this format."""
        with _Reading(where):
            value = json.loads(data)
            _check_version(value, where)
            value["identity"] = Identity(**value["identity"])
            value["program"] = Program(**value["program"])
            value["files"] = {name: (size, sha) for name, (size, sha) in value["files"].items()}
            record = cls(**value)
            for name, (size, _) in record.files.items():
                if not _FILE_NAME.fullmatch(name):
                    raise DamagedStore(f"{where} names the file {name!r}, outside its shard.")
                _check_counts(where, size=size)
            _check_counts(where, first_row=record.first_row, tokens=record.tokens)
        return record


@dataclasses.dataclass(frozen=True)
class Shard:
    """A line of the manifest's shard table."""

    name: str
    first_row: int
    passages: int
    tokens: int
    bytes: int
    program: int  # index into Manifest.programs
    record_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished store is."""

    identity: Identity
    num_passages: int
    num_tokens: int
    num_bytes: int  # of all shards' files
    truncated: int
    longest: int
    programs: tuple[Program, ...]
    codec_error: dict[str, float] | None  # of the stored type against float32, on a sample
    shards: tuple[Shard, ...]

    def to_bytes(self) -> bytes:
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return folder.dump_json({**value, "sha256": _self_checksum(value)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises:
        ValueError: written by another version of the format.
        DamagedStore: the bytes are not those that were written, or make no sense.
        """
        with _Reading(where):
            value = json.loads(data)
            version = _check_version(value, where)
            checksum = value.pop("sha256")
            if checksum != _self_checksum({"format_version": version, **value}):
                raise DamagedStore(
                    f"{where} has been changed since it was written: its checksum differs. "
                    "Run the same build_memory command again to write it anew."
                )
            value["identity"] = Identity(**value["identity"])
            value["programs"] = tuple(Program(**program) for program in value["programs"])
            value["shards"] = tuple(Shard(**shard) for shard in value["shards"])
            manifest = cls(**value)
            manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        row = tokens = 0
        for shard in self.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise DamagedStore(f"{where} names the shard {shard.name!r}, outside the store.")
            _check_counts(where, tokens=shard.tokens, bytes=shard.bytes, passages=shard.passages)
            if shard.first_row != row or not 0 <= shard.program < len(self.programs):
                raise DamagedStore(f"{where}: the entry of shard {shard.name!r} does not fit.")
            row += shard.passages
            tokens += shard.tokens
        if (row, tokens) != (self.num_passages, self.num_tokens):
            raise DamagedStore(
                f"{where} promises {self.num_passages} passages and {self.num_tokens} tokens; its "
                f"shards have {row} and {tokens}."
            )


class _Reading:
    """Turns what parsing raises on nonsense into a DamagedStore that names the file."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        nonsense = (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError)
        if isinstance(error, nonsense):
            raise DamagedStore(f"{self.where} cannot be read: {error!r}.") from error
        return False


def _check_version(value: dict[str, Any], where: str) -> int:
    version = value.pop("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {version}; this program reads version {FORMAT_VERSION}. "
            "Build the memory again, or use the version of glimmer_jax that wrote it."
        )
    return version


def _check_counts(where: str, **counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or not 0 <= count < 2**62:
            raise DamagedStore(f"{where} holds an impossible number, {name} = {count!r}.")


def _self_checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(folder.dump_json(value)).hexdigest()


def shard_folder(name: str) -> str:
    return f"shards/{name}"


def describe(program: Program) -> str:
    """One line for messages."""
    fields = dataclasses.asdict(program).items()
    return ", ".join(f"{name}={value}" for name, value in fields)


def check_fingerprint(kind: str, stored: str, wanted: str | None, where: str) -> None:
    """Refuses a store whose encoder or vocabulary is not the one at hand."""
    if wanted is not None and stored != wanted:
        raise ValueError(
            f"The memory store {where} was built with the {kind} {stored}, and this model's {kind} "
            f"is {wanted}. Build the memory again with this model, or use the model that built it."
        )
