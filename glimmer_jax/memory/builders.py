"""Many builders of one store: each writes whole shards of its own, the first of them the manifest.

Which builder makes which shard follows from its number alone, so they need no messages, only a
folder that all of them see. Shards do not know who made them, so the bytes are those of one builder.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tensorstore as ts

from glimmer_jax import folder
from glimmer_jax.lock import WriterLock
from glimmer_jax.memory.resume import Todo
from glimmer_jax.preemption import Preempted, Watcher

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
    watcher: Watcher,
    poll_seconds: float = 5.0,
) -> dict[str, RecordT]:
    """Records of shards that other builders make, by name, as soon as all are there.

    Args:
      read: gives the record of a finished shard, and raises ValueError for one of another job.

    Raises:
      Preempted: asked to stop, or no shard was finished for `wait_seconds`.
    """
    records: dict[str, RecordT] = {}
    last = time.monotonic()
    while True:
        for item in shards:
            if watcher.requested:
                break
            if item.name not in records and (record := read(item)) is not None:
                records[item.name], last = record, time.monotonic()
        missing = [item.name for item in shards if item.name not in records]
        if not missing:
            return records
        if watcher.requested or time.monotonic() - last >= builders.wait_seconds:
            raise Preempted(
                f"{len(missing)} shards of other builders are missing, the first {missing[0]}. Start "
                "all builders again; they go on where they were."
            )
        time.sleep(min(poll_seconds, builders.wait_seconds))
