"""What a memory store says of itself: the manifest, and one small record beside each shard.

    memory/
      manifest.json               written last: a folder without it is an unfinished build
      shards/000000/
        shard.json                written after the shard's arrays: sizes and SHA-256 of its files
        ids/ offsets/ titles/ digests/
                                  zarr v3 arrays of the shard's passages
        states/ ...               zarr v3 arrays of the codec, `[tokens, ...]`

A shard knows neither its name nor its place and needs no other shard, so shards are built, checked,
rebuilt, added and copied to other stores one by one, by any number of processes; only the manifest
puts them in order. Checksums form a chain: the manifest holds the SHA-256 of each record and of
itself, a record those of its files and of itself. Neither holds a time, a host or a path, so the same
build gives the same bytes.

A finished store is changed by writing a new manifest, never by changing shards that the old one
names: whoever has opened a version reads that version to its end.

What must agree between shards, and between a memory and the model that reads it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from glimmer_jax.storage import folder


@dataclasses.dataclass(frozen=True)
class Identity:
    """What must agree for shards to belong to one store."""

    encoder_fingerprint: str
    vocabulary_fingerprint: str
    codec: str
    emb_dim: int
    max_length: int  # tokens; longer passages were cut to it


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device ran: two builds agree to the last bit only if this is equal."""

    rows: int  # passages in one device's batch
    buckets: tuple[int, ...]  # lengths, in tokens, that a batch may be padded to
    dtype: str  # of activations while encoding
    matmul_dtype: str | None  # of the operands of projections, where it is not `dtype`
    backend: str  # cpu, gpu or tpu; gpu+cudnn with its attention
    jax_version: str

    def __post_init__(self):
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if self.rows < 1:
            raise ValueError(f"A batch needs at least one row a device, got {self.rows}.")
        increasing = all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
        if not self.buckets or self.buckets[0] < 1 or not increasing:
            raise ValueError(f"Length buckets must be increasing and positive: {self.buckets}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How passages were cut into shards and chunks; shards of one store may differ in it."""

    shard_passages: int  # passages in each shard of a build but the last
    chunk_tokens: int  # tokens in the smallest unit that is read and checksummed

    def __post_init__(self):
        if min(self.shard_passages, self.chunk_tokens) < 1:
            raise ValueError(
                "shard_passages and chunk_tokens must be at least 1; got "
                f"{self.shard_passages}, {self.chunk_tokens}."
            )


def describe(settings: Program | Layout) -> str:
    """One line for messages."""
    fields = dataclasses.asdict(settings).items()
    return ", ".join(f"{name}={value}" for name, value in fields)


def check_identity(where: str, stored: Identity, wanted: Identity) -> None:
    """Raises ValueError naming every difference."""
    differences = [
        f"{field.name} {getattr(stored, field.name)} (now {getattr(wanted, field.name)})"
        for field in dataclasses.fields(Identity)
        if getattr(stored, field.name) != getattr(wanted, field.name)
    ]
    if differences:
        raise ValueError(
            f"{where} belongs to another build: {', '.join(differences)}. Go on with the same "
            "checkpoint, vocabulary and settings, or build into another folder."
        )


def check_fingerprint(kind: str, stored: str, wanted: str | None, where: Any) -> None:
    """Refuses a store whose encoder or vocabulary is not the one at hand."""
    if wanted is not None and stored != wanted:
        raise ValueError(
            f"The memory store {where} was built with the {kind} {stored}, and this model's {kind} "
            f"is {wanted}. Build the memory again with this model, or use the model that built it."
        )


def check_passages(stored: Sequence[str], wanted: str, where: Any) -> None:
    """Refuses a store made from other passages than those at hand, though ids may agree."""
    if wanted not in stored:
        raise ValueError(
            f"The memory store {where} was built from the passages {', '.join(stored)}, and the "
            f"passages folder at hand has {wanted}: the same id may be another text. Use the "
            "passages folder that the memory was built from, or build the memory of this one."
        )


FORMAT_VERSION = 3
MANIFEST = "manifest.json"
RECORD = "shard.json"
LOCK = "build.lock"  # held by the one writer; see `glimmer_jax.storage.lease`

_SHARD_NAME = re.compile(r"[0-9a-z][0-9a-z_-]*")
_BUILD_MANIFEST = "Run the same build_memory command again to write it anew."
_BUILD_SHARD = (
    "Repair the shard with --run_mode=memory --action=repair, or run the same build_memory command "
    "again; it builds that shard alone."
)
_FILE_NAME = re.compile(r"[0-9a-z_]+/(zarr\.json|c(/[0-9]+)+)")


class DamagedStore(ValueError):
    """Bytes of a store are missing or are not those that were written."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished shard."""

    identity: Identity
    program: Program
    layout: Layout
    passages: int
    tokens: int
    truncated: int  # passages cut to max_length
    longest: int  # tokens of the longest passage
    source_sha256: str  # of the passages it was made from: ids, titles and tokens
    files: dict[str, tuple[int, str]]  # path inside the shard -> bytes, SHA-256

    def to_bytes(self) -> bytes:
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return folder.dump_json({**value, "sha256": _self_checksum(value)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Record":
        """Raises:
        ValueError: written by another version of the format.
        DamagedStore: the bytes are not those that were written, or make no sense.
        """
        with _Reading(where, _BUILD_SHARD):
            value = json.loads(data)
            _check_self(value, where, _BUILD_SHARD)
            value["identity"] = Identity(**value["identity"])
            value["program"] = Program(**value["program"])
            value["layout"] = Layout(**value["layout"])
            value["files"] = {name: (size, sha) for name, (size, sha) in value["files"].items()}
            record = cls(**value)
            for name, (size, _) in record.files.items():
                if not _FILE_NAME.fullmatch(name):
                    raise DamagedStore(f"{where} names the file {name!r}, outside its shard.")
                _check_counts(where, size=size)
            _check_counts(where, passages=record.passages, tokens=record.tokens)
        return record

    @property
    def bytes(self) -> int:
        """Of the shard's files."""
        return sum(size for size, _ in self.files.values())


@dataclasses.dataclass(frozen=True)
class Shard:
    """A line of the manifest's shard table."""

    name: str
    first_row: int
    passages: int
    tokens: int
    bytes: int
    truncated: int
    longest: int
    program: Program
    layout: Layout
    record_sha256: str

    @classmethod
    def of(cls, name: str, record: Record) -> "Shard":
        """The line of a finished shard; its place is given by the manifest."""
        return cls(
            name=name,
            first_row=0,
            passages=record.passages,
            tokens=record.tokens,
            bytes=record.bytes,
            truncated=record.truncated,
            longest=record.longest,
            program=record.program,
            layout=record.layout,
            record_sha256=hashlib.sha256(record.to_bytes()).hexdigest(),
        )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished store is."""

    identity: Identity
    version: int  # 1 when it was built, one more after each change
    num_passages: int  # rows, withdrawn ones included
    num_tokens: int
    num_bytes: int  # of all shards' files
    truncated: int
    longest: int
    passages_fingerprints: tuple[str, ...]  # of the passages folders it was made from
    codec_error: dict[str, float] | None  # of the stored type against float32, on a sample
    withdrawn: tuple[int, ...]  # rows that count no longer, increasing
    shards: tuple[Shard, ...]

    @classmethod
    def of(
        cls,
        identity: Identity,
        shards: Sequence[Shard],
        *,
        version: int,
        passages_fingerprints: Sequence[str],
        codec_error: dict[str, float] | None,
        withdrawn: Sequence[int] = (),
    ) -> "Manifest":
        """The manifest of these shards, in this order."""
        placed, row = [], 0
        for shard in shards:
            placed.append(dataclasses.replace(shard, first_row=row))
            row += shard.passages
        return cls(
            identity=identity,
            version=version,
            num_passages=row,
            num_tokens=sum(shard.tokens for shard in shards),
            num_bytes=sum(shard.bytes for shard in shards),
            truncated=sum(shard.truncated for shard in shards),
            longest=max((shard.longest for shard in shards), default=0),
            passages_fingerprints=tuple(dict.fromkeys(passages_fingerprints)),
            codec_error=codec_error,
            withdrawn=tuple(sorted(withdrawn)),
            shards=tuple(placed),
        )

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every program that made a shard, once."""
        return tuple(dict.fromkeys(shard.program for shard in self.shards))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Every layout of a shard, once."""
        return tuple(dict.fromkeys(shard.layout for shard in self.shards))

    def to_bytes(self) -> bytes:
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        # Each program and layout once; shards refer to them by number.
        value["programs"] = [dataclasses.asdict(program) for program in self.programs]
        value["layouts"] = [dataclasses.asdict(layout) for layout in self.layouts]
        for line, shard in zip(value["shards"], self.shards, strict=True):
            line["program"] = self.programs.index(shard.program)
            line["layout"] = self.layouts.index(shard.layout)
        return folder.dump_json({**value, "sha256": _self_checksum(value)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises:
        ValueError: written by another version of the format.
        DamagedStore: the bytes are not those that were written, or make no sense.
        """
        with _Reading(where, _BUILD_MANIFEST):
            value = json.loads(data)
            _check_self(value, where, _BUILD_MANIFEST)
            value["identity"] = Identity(**value["identity"])
            value["passages_fingerprints"] = tuple(value["passages_fingerprints"])
            value["withdrawn"] = tuple(value["withdrawn"])
            programs = [Program(**program) for program in value.pop("programs")]
            layouts = [Layout(**layout) for layout in value.pop("layouts")]
            value["shards"] = tuple(
                Shard(
                    **{
                        **line,
                        "program": _pick(programs, line["program"], where, line["name"]),
                        "layout": _pick(layouts, line["layout"], where, line["name"]),
                    }
                )
                for line in value["shards"]
            )
            manifest = cls(**value)
            manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        row = tokens = 0
        for shard in self.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise DamagedStore(f"{where} names the shard {shard.name!r}, outside the store.")
            _check_counts(where, tokens=shard.tokens, bytes=shard.bytes, passages=shard.passages)
            if shard.first_row != row:
                raise _does_not_fit(where, shard.name)
            row += shard.passages
            tokens += shard.tokens
        if (row, tokens) != (self.num_passages, self.num_tokens):
            raise DamagedStore(
                f"{where} promises {self.num_passages} passages and {self.num_tokens} tokens; its "
                f"shards have {row} and {tokens}."
            )
        for withdrawn in self.withdrawn:
            _check_counts(where, withdrawn=withdrawn)
        gone = self.withdrawn
        if gone and (gone[-1] >= row or any(a >= b for a, b in zip(gone, gone[1:], strict=False))):
            raise DamagedStore(f"{where} withdraws rows that it does not have.")


def _pick(table: list, index: Any, where: str, name: Any) -> Any:
    if not isinstance(index, int) or not 0 <= index < len(table):
        raise _does_not_fit(where, name)
    return table[index]


def _does_not_fit(where: str, name: Any) -> DamagedStore:
    return DamagedStore(f"{where}: the entry of shard {name!r} does not fit.")


class _Reading:
    """Turns what parsing raises on nonsense into a DamagedStore that names the file."""

    def __init__(self, where: str, way_out: str):
        self.where, self.way_out = where, way_out

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        nonsense = (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError)
        if isinstance(error, nonsense):
            words = f"{self.where} cannot be read: {error!r}. {self.way_out}"
            raise DamagedStore(words) from error
        return False


def _check_self(value: dict[str, Any], where: str, way_out: str) -> None:
    """Takes version and checksum out of `value`, and compares them."""
    version = value.pop("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {version}; this program reads version {FORMAT_VERSION}. "
            "Build the memory again, or use the version of glimmer_jax that wrote it."
        )
    checksum = value.pop("sha256")
    if checksum != _self_checksum({"format_version": version, **value}):
        raise DamagedStore(
            f"{where} has been changed since it was written: its checksum differs. {way_out}"
        )


def _check_counts(where: str, **counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or not 0 <= count < 2**62:
            raise DamagedStore(f"{where} holds an impossible number, {name} = {count!r}.")


def _self_checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(folder.dump_json(value)).hexdigest()


def shard_folder(name: str) -> str:
    return f"shards/{name}"
