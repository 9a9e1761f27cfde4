"""The manifest of a memory store, and the record beside each shard.

    memory/
      manifest.json               written last: a folder without it is an unfinished build
      shards/000000/
        shard.json                the record, written after the arrays: sizes and SHA-256 of all files
        ids/ offsets/ titles/ digests/
                                  zarr v3 arrays of the shard's passages
        states/ ...               zarr v3 arrays of the codec, `[tokens, ...]`

A shard contains neither its name nor its position and depends on no other shard. Shards are therefore
built, checked, rebuilt, appended and copied one by one, by any number of processes; only the manifest
orders them.

Checksums form a chain. The manifest holds the SHA-256 of itself and of each record; a record holds
those of itself and of its files. Neither holds a time, a host or a path, so equal builds have equal
bytes.

A finished store is changed by writing a new manifest, never by changing shards that an older one
names. A reader that has opened a version can read that version to its end.
"""

import contextlib
import dataclasses
import hashlib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import DamagedData
from glimmer_jax.storage.json_lines import parse_line

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
RECORD = "shard.json"
LOCK = "build.lock"  # held by the writer; see `glimmer_jax.storage.lease`

_SHARD_NAME = re.compile(r"[0-9a-z][0-9a-z_-]*")
_FILE_NAME = re.compile(r"[0-9a-z_]+/(zarr\.json|c(/[0-9]+)+)")
_REBUILD_MANIFEST = "Rerun the same build_memory command: it rewrites the manifest."
_REBUILD_SHARD = (
    "Repair the shard with --run_mode=memory --action=repair, or rerun the command that built it: only "
    "this shard is rebuilt."
)


class DamagedStore(DamagedData):
    """Bytes of a store are missing, or differ from those that were written."""


def shard_folder(name: str) -> str:
    """The folder of shard `name` inside the store."""
    return f"shards/{name}"


@dataclasses.dataclass(frozen=True)
class Identity:
    """Facts in which all shards of a store and the model that reads it must agree."""

    encoder_fingerprint: str
    vocabulary_fingerprint: str
    codec: str
    emb_dim: int  # D
    max_length: int  # tokens; longer passages were truncated to it


@dataclasses.dataclass(frozen=True)
class EncodeProgram:
    """The program of one device: builds agree bit for bit only if their programs are equal."""

    rows: int  # passages in the batch of one device
    buckets: tuple[int, ...]  # lengths in tokens that a batch may be padded to
    dtype: str  # of activations while encoding
    matmul_dtype: str | None  # of the operands of projections; None is `dtype`
    backend: str  # cpu, gpu or tpu; and +cudnn or +tpu with a fused attention
    jax_version: str

    def __post_init__(self):
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if self.rows < 1:
            raise ValueError(f"BATCH_SIZE must be at least 1 row per device, got {self.rows}.")
        increasing = all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
        if not self.buckets or self.buckets[0] < 1 or not increasing:
            raise ValueError(f"Length buckets must be increasing and positive: {self.buckets}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How passages are divided into shards and chunks; shards of one store may differ in it."""

    shard_passages: int = 1024  # passages in each shard of a build except the last
    chunk_tokens: int = 64  # tokens in the smallest unit that is read and checksummed

    def __post_init__(self):
        if min(self.shard_passages, self.chunk_tokens) < 1:
            raise ValueError(
                "shard_passages and chunk_tokens must be at least 1; got "
                f"{self.shard_passages}, {self.chunk_tokens}."
            )


def describe(settings: EncodeProgram | Layout) -> str:
    """One line for messages."""
    fields = dataclasses.asdict(settings).items()
    return ", ".join(f"{name}={value}" for name, value in fields)


def check_identity(where: str, stored: Identity, expected: Identity) -> None:
    """Raises ValueError naming every difference."""
    differences = [
        f"{field.name} {getattr(stored, field.name)} (now {getattr(expected, field.name)})"
        for field in dataclasses.fields(Identity)
        if getattr(stored, field.name) != getattr(expected, field.name)
    ]
    if differences:
        raise ValueError(
            f"{where} belongs to another build: {', '.join(differences)}. Use the same checkpoint, "
            "vocabulary and settings, or build into another folder."
        )


def check_fingerprint(kind: str, stored: str, expected: str | None, where: Any) -> None:
    """Raises ValueError if a store has another encoder or vocabulary; None is not checked."""
    if expected is not None and stored != expected:
        raise ValueError(
            f"The memory store {where} was built with the {kind} {stored}, but the model's {kind} "
            f"is {expected}. Rebuild the memory with this model, or use the model that built it."
        )


def check_passages(stored: Sequence[str], expected: str, where: Any) -> None:
    """Raises ValueError if a store was built from other passages, even where the ids agree."""
    if expected not in stored:
        raise ValueError(
            f"The memory store {where} was built from the passages {', '.join(stored)}, but the "
            f"passages folder is {expected}: the same id may have another text. Use the passages "
            "folder that the memory was built from, or build the memory of this one."
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished shard."""

    identity: Identity
    program: EncodeProgram
    layout: Layout
    passages: int
    tokens: int
    truncated: int  # passages truncated to max_length
    longest: int  # tokens of the longest passage
    source_sha256: str  # of the passages: ids, titles and tokens
    files: dict[str, tuple[int, str]]  # path inside the shard -> bytes, SHA-256
    seals: dict[str, str]  # codec array -> the seal inside its file, see `shard`

    def to_bytes(self) -> bytes:
        """JSON with the format version and a checksum of itself."""
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return folder.dump_json({**value, "sha256": _self_checksum(value)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Record":
        """Raises ValueError for another format version, DamagedStore for changed or invalid bytes."""
        value = _checked_fields(data, where, _REBUILD_SHARD)
        with _parsing(where, _REBUILD_SHARD):
            value["identity"] = Identity(**value["identity"])
            value["program"] = EncodeProgram(**value["program"])
            value["layout"] = Layout(**value["layout"])
            value["files"] = {name: (size, sha) for name, (size, sha) in value["files"].items()}
            record = cls(**value)
            _check_fields(where, record, record.identity, record.program, record.layout)
            for name, (size, _) in record.files.items():
                if not _FILE_NAME.fullmatch(name):
                    raise DamagedStore(f"{where} names the file {name!r}, outside its shard.")
                _check_counts(where, size=size)
        return record

    @property
    def bytes(self) -> int:
        """Size of all files of the shard."""
        return sum(size for size, _ in self.files.values())


@dataclasses.dataclass(frozen=True)
class Shard:
    """The entry of one shard in the manifest."""

    name: str
    first_row: int
    passages: int
    tokens: int
    bytes: int
    truncated: int
    longest: int
    program: EncodeProgram
    layout: Layout
    record_sha256: str

    @classmethod
    def of(cls, name: str, record: Record) -> "Shard":
        """The entry of a finished shard; `Manifest.of` sets its first row."""
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
    """One version of a finished store."""

    identity: Identity
    version: int  # 1 after the build, one more after each change
    num_passages: int  # rows, withdrawn ones included
    num_tokens: int
    num_bytes: int  # of the files of all shards
    truncated: int
    longest: int
    passages_fingerprints: tuple[str, ...]  # of the passages folders it was built from
    codec_error: dict[str, float] | None  # of the stored arrays against float32, on a sample
    withdrawn: tuple[int, ...]  # rows that are no longer valid, increasing
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
    def programs(self) -> tuple[EncodeProgram, ...]:
        """The distinct programs of all shards."""
        return tuple(dict.fromkeys(shard.program for shard in self.shards))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The distinct layouts of all shards."""
        return tuple(dict.fromkeys(shard.layout for shard in self.shards))

    def to_bytes(self) -> bytes:
        """JSON with the format version and a checksum of itself."""
        value = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        # Programs and layouts are written once; shards refer to them by index.
        value["programs"] = [dataclasses.asdict(program) for program in self.programs]
        value["layouts"] = [dataclasses.asdict(layout) for layout in self.layouts]
        for entry, shard in zip(value["shards"], self.shards, strict=True):
            entry["program"] = self.programs.index(shard.program)
            entry["layout"] = self.layouts.index(shard.layout)
        return folder.dump_json({**value, "sha256": _self_checksum(value)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises ValueError for another format version, DamagedStore for changed or invalid bytes."""
        value = _checked_fields(data, where, _REBUILD_MANIFEST)
        with _parsing(where, _REBUILD_MANIFEST):
            value["identity"] = Identity(**value["identity"])
            value["passages_fingerprints"] = tuple(value["passages_fingerprints"])
            value["withdrawn"] = tuple(value["withdrawn"])
            programs = [EncodeProgram(**program) for program in value.pop("programs")]
            layouts = [Layout(**layout) for layout in value.pop("layouts")]
            value["shards"] = tuple(
                Shard(
                    **{
                        **entry,
                        "program": _by_index(programs, entry["program"], where, entry["name"]),
                        "layout": _by_index(layouts, entry["layout"], where, entry["name"]),
                    }
                )
                for entry in value["shards"]
            )
            manifest = cls(**value)
            manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        _check_fields(where, self, self.identity, *self.programs, *self.layouts, *self.shards)
        if not all(type(value) in (int, float) for value in (self.codec_error or {}).values()):
            raise DamagedStore(
                f"{where} holds no numbers in codec_error: {self.codec_error!r:.80}."
            )
        if not all(type(value) is str for value in self.passages_fingerprints):
            raise DamagedStore(
                f"{where} holds no texts in passages_fingerprints: {self.passages_fingerprints!r:.80}."
            )
        row = tokens = 0
        for shard in self.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise DamagedStore(f"{where} names the shard {shard.name!r}, outside the store.")
            if shard.first_row != row:
                raise _invalid_entry(where, shard.name)
            row += shard.passages
            tokens += shard.tokens
        if (row, tokens) != (self.num_passages, self.num_tokens):
            raise DamagedStore(
                f"{where} has totals of {self.num_passages} passages and {self.num_tokens} tokens, "
                f"but its shards have {row} and {tokens}."
            )
        for withdrawn in self.withdrawn:
            _check_counts(where, withdrawn=withdrawn)
        rows = self.withdrawn
        if rows and (rows[-1] >= row or any(a >= b for a, b in zip(rows, rows[1:], strict=False))):
            raise DamagedStore(f"{where} withdraws rows that do not exist.")


def _by_index(table: list, index: Any, where: str, name: Any) -> Any:
    if not isinstance(index, int) or not 0 <= index < len(table):
        raise _invalid_entry(where, name)
    return table[index]


def _invalid_entry(where: str, name: Any) -> DamagedStore:
    return DamagedStore(f"{where}: the entry of shard {name!r} is invalid.")


@contextlib.contextmanager
def _parsing(where: str, remedy: str) -> Iterator[None]:
    """Turns errors about a file's content into a DamagedStore that names the file."""
    try:
        yield
    except DamagedStore:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise DamagedStore(f"{where} cannot be parsed: {error!r}. {remedy}") from error


def _checked_fields(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The fields of a file, without version and checksum. Raises ValueError and DamagedStore."""
    with _parsing(where, remedy):
        value = parse_line(data, where)
        version = value.pop("format_version")
    if "vocab_size" in value and "files" in value:
        raise ValueError(
            f"MEMORY_DIR: {where} belongs to a passages folder. Set PASSAGES_DIR to it, and MEMORY_DIR "
            "to a memory written by --run_mode=build_memory."
        )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {version!r:.20}; this program reads version "
            f"{FORMAT_VERSION}. Rebuild the memory, or use the version of glimmer_jax that wrote it."
        )
    if value.pop("sha256", None) != _self_checksum({"format_version": version, **value}):
        raise DamagedStore(
            f"{where} has been changed since it was written: its checksum differs. {remedy}"
        )
    return value


def _check_fields(where: str, *objects: Any) -> None:
    """Raises DamagedStore for fields of another type and impossible counts, except in containers."""
    for item in objects:
        for field in dataclasses.fields(item):
            value, hint = getattr(item, field.name), field.type
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if type(value) not in [typing.get_origin(option) or option for option in options]:
                raise DamagedStore(f"{where} holds {field.name} = {value!r:.40}, expected {hint}.")
            if type(value) is int:
                _check_counts(where, **{field.name: value})


def _check_counts(where: str, **counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or not 0 <= count < 2**62:
            raise DamagedStore(f"{where} holds an impossible number, {name} = {count!r}.")


def _self_checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(folder.dump_json(value)).hexdigest()
