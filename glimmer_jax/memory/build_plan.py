"""What is left to build: the corpus in shards, less those that are finished.

A shard counts as finished if its record is there, belongs to the same job (encoder, vocabulary,
codec, lengths, program, layout), was made from the same passages, and its files are whole. Anything
else is either computed again (no record, files cut short) or refused with both sides named.

Many builders of one store: each writes whole shards of its own, the first of them the manifest.

Which builder makes which shard follows from its number alone, so they need no messages, only a
folder that all of them see. Shards do not know who made them, so the bytes are those of one builder.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import tensorstore as ts

from glimmer_jax.memory import manifest, shard, versions
from glimmer_jax.memory.encoding import Recipe
from glimmer_jax.memory.manifest import Identity, Layout, Program, Record, check_identity, describe
from glimmer_jax.memory.shard import Passages, read_source
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.runtime.progress import with_progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)

_GO_ON = (
    "Run with the former settings, accept it with ACCEPT_OTHER_PROGRAM = True (both are recorded), or "
    "build into another folder."
)


@dataclasses.dataclass(frozen=True)
class Todo:
    """A shard to be."""

    name: str
    rows: np.ndarray  # of the passages folder


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shards to build, in order, and the records of those that are finished, by name."""

    todo: list[Todo]
    finished: Mapping[str, Record]

    def remaining_passages(self) -> int:
        return sum(len(item.rows) for item in self.todo)


def shard_name(index: int) -> str:
    return f"{index:06d}"


def cut(rows: np.ndarray, shard_passages: int, first_index: int = 0) -> list[Todo]:
    """Consecutive `rows` as shards, named by number."""
    starts = range(0, len(rows), shard_passages)
    return [
        Todo(shard_name(first_index + i), rows[start : start + shard_passages])
        for i, start in enumerate(starts)
    ]


def plan(
    kvstore: ts.KvStore,
    passages: Passages,
    shards: list[Todo],
    recipe: Recipe,
    layout: Layout,
    accept_other_program: bool,
    abandoned: bool = False,
) -> Plan:
    """Looks at every one of `shards`.

    Args:
      abandoned: no manifest names these; one that is of another job or of other passages was left by a
        change that stopped, and is built anew.

    Raises:
      ValueError: what is there belongs to another job or to other passages.
      OSError: the storage did not answer.
      StopRequested: asked to stop.
    """
    todo, finished = [], {}
    for item in with_progress(shards, "existing shards", "shards"):
        STOP.poll("Stopped before anything was built. Run the same command again.")
        try:
            record = read_whole(kvstore, item, passages, recipe, layout, accept_other_program)
        except ValueError as refused:
            if not abandoned:
                raise
            logger.warning("building shard %s anew: %s", item.name, refused)
            record = None
        if record is None:
            todo.append(item)
        else:
            finished[item.name] = record
    if finished:
        logger.info("%d of %d shards are already built", len(finished), len(shards))
    return Plan(todo, finished)


def read_record(kvstore: ts.KvStore, name: str) -> Record | None:
    """The record of a finished shard, or None."""
    here = folder.subfolder(kvstore, manifest.shard_folder(name))
    data = folder.read_file(here, manifest.RECORD)
    return None if data is None else Record.from_bytes(data, f"{here.url}{manifest.RECORD}")


def read_whole(
    kvstore: ts.KvStore,
    item: Todo,
    passages: Passages,
    recipe: Recipe,
    layout: Layout,
    accept_other_program: bool,
) -> Record | None:
    """The record of a shard of this job that is there and whole; None where it is to be built.

    Raises ValueError for one of another job or of other passages.
    """
    here = folder.subfolder(kvstore, manifest.shard_folder(item.name))
    where = f"{here.url}{manifest.RECORD}"
    try:
        record = read_record(kvstore, item.name)
    except manifest.DamagedStore as damage:
        logger.warning("shard %s is built again: %s", item.name, damage)
        return None
    if record is None:
        return None
    check_identity(where, record.identity, recipe.identity)
    _check_layout(where, record.layout, layout)
    if not accept_other_program:
        check_program(where, record.program, recipe.program, _GO_ON)
    _check_source(where, record, item, passages, recipe.identity.max_length)
    problems = shard.check_sizes(here, record.files)
    if problems:
        logger.warning("shard %s is built again: %s", item.name, "; ".join(problems))
        return None
    return record


def check_manifest(kvstore: ts.KvStore, identity: Identity, count: int) -> None:
    """A finished store of another job is not written over, even where its shards are gone.

    Args:
      count: shards that this job makes.
    """
    data = folder.read_file(kvstore, manifest.MANIFEST)
    if data is None:
        versions.check_unchanged(kvstore, None)
        return
    where = f"{kvstore.url}{manifest.MANIFEST}"
    try:
        found = manifest.Manifest.from_bytes(data, where)
    except manifest.DamagedStore as damage:
        versions.check_unchanged(kvstore, damage)
        logger.warning("writing the manifest anew: %s", damage)
        return
    check_identity(where, found.identity, identity)
    if found.version > 1:
        raise ValueError(
            f"{where} is version {found.version}: the store has been changed since it was built. "
            "Change it further with --run_mode=memory, or build into another folder."
        )
    if len(found.shards) != count:
        raise ValueError(
            f"{where} describes a finished store of {found.num_passages} passages in "
            f"{len(found.shards)} shards; these passages need {count}. Build into another folder, "
            "or add passages with --run_mode=memory --action=append."
        )


def check_program(where: str, stored: Program, now: Program, way_out: str) -> None:
    """Refuses to mix what two programs have computed; `way_out` follows what is wrong."""
    if stored != now:
        raise ValueError(
            f"{where} was built by the program ({describe(stored)}), and this is "
            f"({describe(now)}). The memory would differ in its last bits. {way_out}"
        )


def _check_layout(where: str, stored: Layout, now: Layout) -> None:
    if stored != now:
        raise ValueError(
            f"{where} was cut with ({describe(stored)}), and this build cuts with "
            f"({describe(now)}). Go on with the former settings, or build into another folder."
        )


def _check_source(
    where: str, record: Record, item: Todo, passages: Passages, max_length: int
) -> None:
    same = record.passages == len(item.rows)
    same = same and read_source(passages, item.rows, max_length).sha256 == record.source_sha256
    if not same:
        raise ValueError(
            f"{where} was made from other passages than those given now. Go on with the same "
            "passages folder, or build into another folder."
        )


RecordT = TypeVar("RecordT")
_FOLDER = "builders/"  # of the locks of all but the first


@dataclasses.dataclass(frozen=True)
class Builders:
    """Who this builder is, of how many."""

    index: int = 0
    count: int = 1
    wait_seconds: float = 3600.0  # the first waits for the others, since their last finished shard

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"Builders count from 0 to BUILDER_COUNT - 1; got BUILDER_INDEX={self.index} of "
                f"BUILDER_COUNT={self.count}."
            )

    def own(self, shards: Sequence[Todo]) -> list[Todo]:
        """The shards that this builder makes."""
        return list(shards[self.index :: self.count])

    @contextlib.contextmanager
    def lock(self, kvstore: ts.KvStore, name: str) -> Iterator[WriterLock]:
        """Holds this builder's lock `name`; the first builder's is the store's own.

        Raises:
          ValueError: another process is this builder, or a living one writes here that is none of
            these: builders of another number share the shards out in another way.
        """
        mine = f"{self._folder}{name}"
        with WriterLock(kvstore, mine, about={"builders": self.count}) as lock:
            # After it is held, so that of two that start at once at least one sees the other.
            for other in [name, *folder.list_files(kvstore, _FOLDER)]:
                if other == mine or not f"/{other}".endswith(f"/{name}"):
                    continue
                held = WriterLock(kvstore, other)
                if (about := held.about()) is not None and about.get("builders") != self.count:
                    held.remove_if_dead()
            yield lock

    @property
    def _folder(self) -> str:
        return "" if self.index == 0 else f"{_FOLDER}{self.index:05d}-of-{self.count:05d}/"


def wait_for_records(
    shards: Sequence[Todo],
    read: Callable[[Todo], RecordT | None],
    builders: Builders,
    poll_seconds: float = 5.0,
) -> dict[str, RecordT]:
    """Records of shards that other builders make, by name, as soon as all are there.

    Args:
      read: gives the record of a finished shard, and raises ValueError for one of another job.

    Raises:
      StopRequested: asked to stop, or no shard was finished for `wait_seconds`.
    """
    records: dict[str, RecordT] = {}
    last = time.monotonic()
    while True:
        for item in shards:
            if STOP.requested:
                break
            if item.name not in records and (record := read(item)) is not None:
                records[item.name], last = record, time.monotonic()
        missing = [item.name for item in shards if item.name not in records]
        if not missing:
            return records
        if STOP.requested or time.monotonic() - last >= builders.wait_seconds:
            raise StopRequested(
                f"{len(missing)} shards of other builders are missing, the first {missing[0]}. Start "
                "all builders again; they go on where they were."
            )
        time.sleep(min(poll_seconds, builders.wait_seconds))
