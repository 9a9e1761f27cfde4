"""What is left to build: the corpus in shards, less those that are finished.

A shard counts as finished if its record is there, belongs to the same job (encoder, vocabulary,
codec, lengths, program), was made from the same passages, and its files are whole. Anything else
is either computed again (no record, files cut short) or refused with both sides named.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from glimmer_jax.memory import folder, manifest, shard
from glimmer_jax.memory.manifest import Identity, Program, Record

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Range:
    """A shard to be: consecutive passages."""

    name: str
    first_row: int
    passages: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shards to build, in order, and the records of those that are finished, by first row."""

    todo: list[Range]
    finished: Mapping[int, Record]

    def remaining_passages(self) -> int:
        return sum(item.passages for item in self.todo)


@dataclasses.dataclass(frozen=True)
class Source:
    """The passages of one shard as they are encoded."""

    tokens: np.ndarray  # int32 [n, max_length], padded with 0
    lengths: np.ndarray  # int64 [n]
    titles: list[str]
    truncated: int
    sha256: str  # of ids, titles, lengths and tokens


def shard_name(index: int) -> str:
    return f"{index:06d}"


def read_source(passages: Any, rows: np.ndarray, max_length: int) -> Source:
    """Reads the passages `rows`, cut to `max_length` tokens."""
    full = np.asarray(passages.lengths(rows), np.int64)
    lengths = np.minimum(full, max_length)
    tokens = np.ascontiguousarray(passages.tokens(rows, max_length), dtype=np.int32)
    titles = [str(passages.text(int(row))["title"]) for row in rows]
    digest = hashlib.sha256(json.dumps(titles).encode("ascii"))
    for part in (np.asarray(passages.ids, np.int64)[rows], full, tokens):
        digest.update(np.ascontiguousarray(part).data)
    return Source(tokens, lengths, titles, int((full > max_length).sum()), digest.hexdigest())


def plan(
    kvstore: ts.KvStore,
    passages: Any,
    identity: Identity,
    program: Program,
    accept_other_program: bool,
) -> Plan:
    """Looks at every shard that the corpus needs.

    Raises:
      ValueError: what is there belongs to another job or to other passages.
    """
    todo, finished = [], {}
    count = -(-len(passages) // identity.shard_passages)
    _check_manifest(kvstore, identity, count)
    for index in range(count):
        first = index * identity.shard_passages
        item = Range(shard_name(index), first, min(identity.shard_passages, len(passages) - first))
        here = folder.subfolder(kvstore, manifest.shard_folder(item.name))
        data = folder.read_file(here, manifest.RECORD)
        if data is None:
            todo.append(item)
            continue
        where = f"{here.url}{manifest.RECORD}"
        record = Record.from_bytes(data, where)
        _check_identity(where, record.identity, identity)
        if record.program != program and not accept_other_program:
            raise ValueError(
                f"{where} was built by the program ({manifest.describe(record.program)}), and this "
                f"is ({manifest.describe(program)}). The memory would differ in its last bits. Run "
                "with the former settings, accept it with accept_other_program=True (both are "
                "recorded), or build into another folder."
            )
        _check_source(where, record, item, passages, identity.max_length)
        problems = shard.check_sizes(here, record.files)
        if problems:
            logger.warning("building shard %s again: %s", item.name, "; ".join(problems))
            todo.append(item)
        else:
            finished[item.first_row] = record
    if finished:
        logger.info("%d of %d shards are already built", len(finished), count)
    return Plan(todo, finished)


def _check_manifest(kvstore: ts.KvStore, identity: Identity, count: int) -> None:
    """A finished store of another job is not written over, even where its shards are gone."""
    data = folder.read_file(kvstore, manifest.MANIFEST)
    if data is None:
        return
    where = f"{kvstore.url}{manifest.MANIFEST}"
    try:
        found = manifest.Manifest.from_bytes(data, where)
    except manifest.DamagedStore as damage:
        logger.warning("writing the manifest anew: %s", damage)
        return
    _check_identity(where, found.identity, identity)
    if len(found.shards) != count:
        raise ValueError(
            f"{where} describes a finished store of {found.num_passages} passages in "
            f"{len(found.shards)} shards; these passages need {count}. Build into another folder."
        )


def _check_identity(where: str, stored: Identity, wanted: Identity) -> None:
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


def _check_source(where: str, record: Record, item: Range, passages: Any, max_length: int) -> None:
    same = (record.first_row, record.passages) == (item.first_row, item.passages)
    if same:
        rows = np.arange(item.first_row, item.first_row + item.passages)
        same = read_source(passages, rows, max_length).sha256 == record.source_sha256
    if not same:
        raise ValueError(
            f"{where} was made from other passages than those given now. Go on with the same "
            "passages folder, or build into another folder."
        )
