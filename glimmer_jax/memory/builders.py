"""Many builders of one store: each writes whole shards of its own, the first of them the manifest.

Which builder makes which shard follows from its number alone, so they need no messages, only a
folder that all of them see. Shards do not know who made them, so the bytes are those of one builder.
"""

import dataclasses
import time
from collections.abc import Sequence

import tensorstore as ts

from glimmer_jax import folder
from glimmer_jax.memory import resume
from glimmer_jax.memory.compute import Recipe
from glimmer_jax.memory.identity import Layout
from glimmer_jax.memory.manifest import Record
from glimmer_jax.memory.resume import Todo
from glimmer_jax.preemption import Preempted, Watcher


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

    def lock_folder(self, kvstore: ts.KvStore) -> ts.KvStore:
        """Where this builder's lock is; the first builder's is the store's own."""
        if self.index == 0:
            return kvstore
        return folder.subfolder(kvstore, f"builders/{self.index:05d}-of-{self.count:05d}")


def wait_for_records(
    kvstore: ts.KvStore,
    shards: Sequence[Todo],
    recipe: Recipe,
    layout: Layout,
    accept_other_program: bool,
    builders: Builders,
    watcher: Watcher,
    poll_seconds: float = 5.0,
) -> dict[str, Record]:
    """The records of `shards`, as soon as the other builders have written them all.

    Raises:
      ValueError: a record belongs to another build.
      Preempted: asked to stop, or no shard was finished for `wait_seconds`.
    """
    records: dict[str, Record] = {}
    last = time.monotonic()
    while missing := [item.name for item in shards if item.name not in records]:
        for name in missing:
            record = resume.read_record(kvstore, name)
            if record is not None:
                resume.check_record(kvstore, name, record, recipe, layout, accept_other_program)
                records[name] = record
                last = time.monotonic()
        if len(records) == len(shards):
            break
        if watcher.requested or time.monotonic() - last >= builders.wait_seconds:
            raise Preempted(
                f"{len(shards) - len(records)} shards of other builders are missing, the first "
                f"{missing[0]}. Start the builders again; all of them go on where they were."
            )
        time.sleep(min(poll_seconds, builders.wait_seconds))
    return records
