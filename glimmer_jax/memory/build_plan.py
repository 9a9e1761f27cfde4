"""Planning a build: which shards are finished, and which builder encodes the others.

A shard is finished if its record exists, agrees with this build (encoder, vocabulary, codec,
lengths, program, layout) and with its passages, and its files are complete. A shard without a
record, or with truncated files, is rebuilt. A record that disagrees raises an error that names both
sides.

Several builders may write one store. The number of a shard decides which builder encodes it, so
builders exchange no messages; they only need a folder that all of them see. Shards do not record
their builder, so the bytes are those of a single builder. The first builder waits for the others
and writes the manifest.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import tensorstore as ts

from glimmer_jax.memory import manifest, shard, versions
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.manifest import (
    EncodeProgram,
    Identity,
    Layout,
    Manifest,
    Record,
    Shard,
    check_identity,
    describe,
)
from glimmer_jax.memory.source import Passages, read_source
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.runtime.progress import with_progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)

_REMEDY = (
    "Use the former settings, accept the difference with ACCEPT_OTHER_PROGRAM = True (both programs are "
    "recorded), or build into another folder."
)
_POLL_SECONDS = 5.0
_BUILDERS = "builders/"  # folder of the locks of all builders except the first


@dataclasses.dataclass(frozen=True)
class PendingShard:
    """A shard that a build must have."""

    name: str
    rows: np.ndarray  # of the passages folder


def shard_name(index: int) -> str:
    """Name of the shard with this index: six digits."""
    return f"{index:06d}"


def cut(rows: np.ndarray, shard_passages: int, first_index: int = 0) -> list[PendingShard]:
    """Consecutive `rows` as shards, named by number."""
    starts = range(0, len(rows), shard_passages)
    return [
        PendingShard(shard_name(first_index + i), rows[start : start + shard_passages])
        for i, start in enumerate(starts)
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shards to encode, in order, and the records of finished shards by name."""

    pending: list[PendingShard]
    finished: Mapping[str, Record]

    def remaining_passages(self) -> int:
        """Number of passages in pending shards."""
        return sum(len(item.rows) for item in self.pending)


@dataclasses.dataclass(frozen=True)
class FinishedShards:
    """Finds the finished shards of a build."""

    kvstore: ts.KvStore
    passages: Passages
    encoder: MemoryEncoder
    layout: Layout
    accept_other_program: bool

    def plan(self, shards: Sequence[PendingShard], abandoned: bool = False) -> Plan:
        """Checks every one of `shards`.

        Args:
          shards: of the build.
          abandoned: no manifest names these shards. One that disagrees was left by a change that
            was stopped, and is rebuilt.

        Raises:
          ValueError: a shard belongs to another build or to other passages.
          OSError: the storage did not answer.
          StopRequested: a stop was requested.
        """
        pending, finished = [], {}
        for item in with_progress(shards, "existing shards", "shards"):
            STOP.poll("Stopped before anything was built. Rerun the same command.")
            try:
                record = self.record(item)
            except ValueError as difference:
                if not abandoned:
                    raise
                logger.warning("rebuilding shard %s: %s", item.name, difference)
                record = None
            if record is None:
                pending.append(item)
            else:
                finished[item.name] = record
        if finished:
            logger.info("%d of %d shards are already built", len(finished), len(shards))
        return Plan(pending, finished)

    def record(self, item: PendingShard) -> Record | None:
        """The record of a finished shard; None if the shard is to be built.

        Raises ValueError if it belongs to another build or to other passages.
        """
        here = folder.subfolder(self.kvstore, manifest.shard_folder(item.name))
        where = f"{here.url}{manifest.RECORD}"
        data = folder.read_file(here, manifest.RECORD)
        if data is None:
            return None
        try:
            record = Record.from_bytes(data, where)
        except manifest.DamagedStore as damage:
            logger.warning("rebuilding shard %s: %s", item.name, damage)
            return None
        check_identity(where, record.identity, self.encoder.identity)
        _check_layout(where, record.layout, self.layout)
        if not self.accept_other_program:
            check_program(where, record.program, self.encoder.program, _REMEDY)
        self._check_source(where, record, item)
        problems = shard.check_sizes(here, record.files)
        if problems:
            logger.warning("rebuilding shard %s: %s", item.name, "; ".join(problems))
            return None
        return record

    def _check_source(self, where: str, record: Record, item: PendingShard) -> None:
        max_length = self.encoder.identity.max_length
        same = record.passages == len(item.rows)
        same = same and (
            read_source(self.passages, item.rows, max_length).sha256 == record.source_sha256
        )
        if not same:
            raise ValueError(
                f"{where} was built from other passages than those of the passages folder. Use the "
                "same passages folder, build into another folder, or, if another shard was copied "
                "here, delete this shard's folder."
            )

    def is_complete(self, stored: Manifest, shards: Sequence[PendingShard]) -> bool:
        """Whether the manifest names exactly these shards and all of them are finished.

        Raises as `plan` does. Nothing is written, so this works on read-only storage.
        """
        plan = self.plan(shards)
        if plan.pending:
            return False
        entries = [Shard.of(item.name, plan.finished[item.name]) for item in shards]
        stored_sums = [(entry.name, entry.record_sha256) for entry in stored.shards]
        return stored_sums == [(entry.name, entry.record_sha256) for entry in entries]


def check_manifest(kvstore: ts.KvStore, identity: Identity, count: int) -> Manifest | None:
    """The manifest of an earlier run of this build; None if the build is to write it.

    Args:
      kvstore: folder of the store.
      identity: of this build.
      count: shards of this build.

    Raises:
      ValueError: the finished store belongs to another build, or has been changed since.
    """
    data = folder.read_file(kvstore, manifest.MANIFEST)
    if data is None:
        versions.check_rebuildable(kvstore, None)
        return None
    where = f"{kvstore.url}{manifest.MANIFEST}"
    try:
        stored = Manifest.from_bytes(data, where)
    except manifest.DamagedStore as damage:
        versions.check_rebuildable(kvstore, damage)
        logger.warning("rewriting the manifest: %s", damage)
        return None
    check_identity(where, stored.identity, identity)
    if stored.version > 1:
        raise ValueError(
            f"{where} is version {stored.version}: the store has been changed since it was built. "
            "Change it further with --run_mode=memory, or build into another folder."
        )
    if len(stored.shards) != count:
        raise ValueError(
            f"{where} describes a finished store of {stored.num_passages} passages in "
            f"{len(stored.shards)} shards; these passages need {count}. Build into another folder, "
            "or append passages with --run_mode=memory --action=append."
        )
    return stored


def check_program(where: str, stored: EncodeProgram, now: EncodeProgram, remedy: str) -> None:
    """Raises ValueError if two programs differ; `remedy` ends the message."""
    if stored != now:
        raise ValueError(
            f"{where} was built by the program ({describe(stored)}), but this is "
            f"({describe(now)}). Their last bits may differ. {remedy}"
        )


def _check_layout(where: str, stored: Layout, now: Layout) -> None:
    if stored != now:
        raise ValueError(
            f"{where} has the layout ({describe(stored)}), but this build uses "
            f"({describe(now)}). Use the former settings, or build into another folder."
        )


@dataclasses.dataclass(frozen=True)
class Builders:
    """Index of this builder, and number of builders of the store."""

    index: int = 0
    count: int = 1
    wait_seconds: float = 3600.0  # the first builder waits this long after the last finished shard

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"Builders count from 0 to BUILDER_COUNT - 1; got BUILDER_INDEX={self.index} of "
                f"BUILDER_COUNT={self.count}."
            )

    def own(self, shards: Sequence[PendingShard]) -> list[PendingShard]:
        """The shards of this builder."""
        return list(shards[self.index :: self.count])

    @contextlib.contextmanager
    def lock(self, kvstore: ts.KvStore, name: str) -> Iterator[WriterLock]:
        """Holds this builder's lock `name`; the lock of the first builder is the store's own.

        Raises:
          ValueError: another process is this builder, or a living one is a builder of another
            count: those divide the shards differently.
        """
        mine = f"{self._folder}{name}"
        with WriterLock(kvstore, mine, about={"builders": self.count}) as lock:
            # Checked while the lock is held: of two that start together, at least one sees the
            # other.
            for other in [name, *folder.list_files(kvstore, _BUILDERS)]:
                if other == mine or not f"/{other}".endswith(f"/{name}"):
                    continue
                held = WriterLock(kvstore, other)
                if (about := held.about()) is not None and about.get("builders") != self.count:
                    held.remove_if_dead()
            yield lock

    def wait_for_records(
        self,
        shards: Sequence[PendingShard],
        finished: FinishedShards,
    ) -> dict[str, Record]:
        """Records of shards that other builders encode, by name, once all of them exist.

        Raises:
          ValueError: a shard belongs to another build.
          StopRequested: a stop was requested, or no shard was finished for `wait_seconds`.
        """
        records: dict[str, Record] = {}
        last = time.monotonic()
        while True:
            for item in shards:
                if STOP.requested:
                    break
                if item.name not in records and (record := finished.record(item)) is not None:
                    records[item.name], last = record, time.monotonic()
            missing = [item.name for item in shards if item.name not in records]
            if not missing:
                return records
            if STOP.requested or time.monotonic() - last >= self.wait_seconds:
                raise StopRequested(
                    f"{len(missing)} shards of other builders are missing, the first {missing[0]}. "
                    "Rerun all builders to resume."
                )
            time.sleep(min(_POLL_SECONDS, self.wait_seconds))

    def wait_for_first(self, url: str, is_complete: Callable[[], bool]) -> None:
        """Returns when the first builder has finished the store at `url`.

        Raises:
          StopRequested: a stop was requested, or the store is not complete after `wait_seconds`.
        """
        end = time.monotonic() + self.wait_seconds
        while not is_complete():
            if STOP.requested or time.monotonic() >= end:
                raise StopRequested(
                    f"{url} was not completed by the first builder. Rerun all builders to resume."
                )
            time.sleep(min(_POLL_SECONDS, self.wait_seconds))

    @property
    def _folder(self) -> str:
        return "" if self.index == 0 else f"{_BUILDERS}{self.index:05d}-of-{self.count:05d}/"


def job_builders(index: int | None = None, count: int | None = None) -> Builders:
    """Builders of one store; by default the processes of this JAX job."""
    return Builders(
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )
