"""Changing a finished store: append passages, withdraw passages, merge stores.

Each change writes a new manifest over shards that never change, so readers keep the version that they
opened. A change that was stopped has changed nothing. Rerunning the same command, at any point, completes
it, and does nothing if it was complete.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence

import numpy as np
import tensorstore as ts

from glimmer_jax.corpus.ids import describe_numbers
from glimmer_jax.memory import build, build_plan, manifest, shard, versions
from glimmer_jax.memory.build import BuildConfig, write_shards
from glimmer_jax.memory.build_plan import FinishedShards
from glimmer_jax.memory.encoding import MemoryEncoder, ShardEncoder
from glimmer_jax.memory.manifest import (
    LOCK,
    MANIFEST,
    DamagedStore,
    Manifest,
    Record,
    Shard,
    check_identity,
    shard_folder,
)
from glimmer_jax.memory.source import Passages, read_source
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)

# Passages whose texts are compared at a time: bounds RAM.
_COMPARED_ROWS = 4096
_REMEDY = "Append with the former settings, or accept it with ACCEPT_OTHER_PROGRAM = True."


@dataclasses.dataclass(frozen=True)
class Difference:
    """Passages of a folder that are missing from a store."""

    new: np.ndarray  # rows of the folder whose ids the store does not have
    changed: np.ndarray  # rows of the folder whose ids the store has with another text


def compare(store: MemoryStore, passages: Passages) -> Difference:
    """Compares every passage by its text, not only by its id.

    Raises StopRequested if a stop is requested.
    """
    rows = store.rows(passages.ids, "mask")
    digests = store.digests()
    changed: list[int] = []
    known = np.flatnonzero(rows >= 0)
    for start in range(0, len(known), _COMPARED_ROWS):
        STOP.poll("Stopped before anything was changed. Rerun the same command.")
        block = known[start : start + _COMPARED_ROWS]
        now = read_source(passages, block, store.manifest.identity.max_length).digests
        changed += block[now != digests[rows[block]]].tolist()
    return Difference(np.flatnonzero(rows < 0), np.array(changed, np.int64))


def append(
    encoder: MemoryEncoder,
    passages: Passages,
    path: folder.Path,
    *,
    passages_fingerprint: str,
    config: BuildConfig = BuildConfig(),
    replace: bool = False,
) -> Manifest:
    """Adds the passages that the store does not have.

    Args:
      encoder: the one that the store was built with.
      passages: the corpus as it is now; passages that the store has are compared and skipped.
      path: the store.
      passages_fingerprint: of `passages`; recorded, since the store now covers them.
      config: layout of the new shards, and whether they may be encoded by another program.
      replace: withdraw passages whose text has changed and add them with the new text, and add
        passages again that were withdrawn.

    Raises:
      ValueError: the store was built by another encoder, vocabulary, codec or program, or texts of
        known ids have changed and `replace` is False.
      StopRequested: a stop was requested; finished shards are kept.
    """
    build.check_ids(passages.ids)
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        store = MemoryStore.open(path)
        old = store.manifest
        where = f"{kvstore.url}{MANIFEST}"
        check_identity(where, old.identity, encoder.identity)
        if old.programs and encoder.program not in old.programs and not config.accept_other_program:
            build_plan.check_program(where, old.programs[-1], encoder.program, _REMEDY)
        difference = compare(store, passages)
        if difference.changed.size and not replace:
            ids = passages.ids[difference.changed]
            raise ValueError(
                f"{len(ids)} passages of the memory store {path} have another text in the passages "
                f"folder: {describe_numbers(ids)}. Set REPLACE=True to replace them, or use the passages "
                "folder that the memory was built from."
            )
        rows = np.concatenate([difference.new, difference.changed])
        if not replace:
            # Withdrawn passages stay withdrawn.
            rows = rows[~np.isin(passages.ids[rows], store.ids)]
        shards = build_plan.cut(rows, config.layout.shard_passages, _first_free_number(old))
        finished = FinishedShards(kvstore, passages, encoder, config.layout, False)
        plan = finished.plan(shards, abandoned=True)
        shard_encoder = ShardEncoder(
            encoder, passages, build.encode_progress(plan.remaining_passages())
        )
        written = write_shards(kvstore, plan.pending, shard_encoder, config.layout, lock)
        records = {**plan.finished, **dict(written)}
        replaced = store.rows(passages.ids[difference.changed])
        new = Manifest.of(
            old.identity,
            [*old.shards, *(Shard.of(item.name, records[item.name]) for item in shards)],
            version=old.version + 1,
            passages_fingerprints=[*old.passages_fingerprints, passages_fingerprint],
            codec_error=old.codec_error,
            withdrawn=[*old.withdrawn, *replaced.tolist()],
        )
        return _replace_if_changed(kvstore, old, new, lock)


def _first_free_number(stored: Manifest) -> int:
    """Number of the first shard name that is larger than all names of the store."""
    numbers = [int(entry.name) for entry in stored.shards if entry.name.isdigit()]
    return max(numbers, default=-1) + 1


def withdraw(path: folder.Path, ids: Iterable[int]) -> Manifest:
    """Removes passages from the next version on: their ids become unknown.

    Their bytes stay for readers of earlier versions. Ids that are already withdrawn are skipped.

    Raises:
      ValueError: the store never had one of the ids.
    """
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        store = MemoryStore.open(path)
        old = store.manifest
        wanted = np.unique(np.fromiter(ids, np.int64))
        live = store.rows(wanted, "mask") >= 0
        done = np.isin(wanted, store.withdrawn_ids()) & ~live
        if done.any():
            logger.info("%d of the passages are already withdrawn", int(done.sum()))
        rows = store.rows(wanted[~done])
        new = Manifest.of(
            old.identity,
            old.shards,
            version=old.version + 1,
            passages_fingerprints=old.passages_fingerprints,
            codec_error=old.codec_error,
            withdrawn=[*old.withdrawn, *rows[rows >= 0].tolist()],
        )
        return _replace_if_changed(kvstore, old, new, lock)


def _replace_if_changed(
    kvstore: ts.KvStore, old: Manifest, new: Manifest, lock: WriterLock
) -> Manifest:
    """The newest manifest: `new`, unless it differs from `old` in nothing but its number."""
    if dataclasses.replace(new, version=old.version) == old:
        logger.info("nothing to change: version %d is up to date", old.version)
        return old
    versions.replace_manifest(kvstore, old, new, lock)
    return new


def merge(parts: Sequence[folder.Path], path: folder.Path) -> Manifest:
    """Writes the store at `path` with the rows of all parts, in order, by copying their shards.

    Args:
      parts: finished stores of the same encoder, vocabulary, codec and length.
      path: a folder without a finished store, or with the result of the same merge.

    Raises:
      ValueError: fewer than two parts, parts that do not belong together or share ids, or another
        store at `path`.
      DamagedStore: a file of a part is missing or damaged.
    """
    if len(parts) < 2:
        raise ValueError(f"PARTS needs two or more stores to merge, got {list(parts)}.")
    stores = [MemoryStore.open(part) for part in parts]
    for store in stores[1:]:
        check_identity(str(store.path), store.manifest.identity, stores[0].manifest.identity)
    _check_distinct_ids(stores)
    merged = _merged_manifest(stores)
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        existing = folder.read_file(kvstore, MANIFEST)
        if existing is not None and existing != merged.to_bytes():
            raise ValueError(
                f"MEMORY_DIR {path} already holds another memory store. Merge into another folder."
            )
        sources = [(store, entry) for store in stores for entry in store.manifest.shards]
        for (store, entry), target in zip(sources, merged.shards, strict=True):
            lock.check()
            STOP.poll("Stopped between two shards. Rerun the same command to resume.")
            _copy_shard(store.kvstore, entry, kvstore, target.name)
        if existing is None:
            lock.check()
            versions.keep_manifest(kvstore, merged)
            folder.write_file(kvstore, MANIFEST, merged.to_bytes())
    return merged


def _merged_manifest(stores: Sequence[MemoryStore]) -> Manifest:
    shards: list[Shard] = []
    withdrawn: list[int] = []
    first_row = 0
    for store in stores:
        withdrawn += [first_row + row for row in store.manifest.withdrawn]
        first_row += len(store)
        for entry in store.manifest.shards:
            shards.append(dataclasses.replace(entry, name=build_plan.shard_name(len(shards))))
    errors = [store.manifest.codec_error for store in stores]
    return Manifest.of(
        stores[0].manifest.identity,
        shards,
        version=1,
        passages_fingerprints=[
            fingerprint for store in stores for fingerprint in store.manifest.passages_fingerprints
        ],
        # The largest; each was measured on its own sample.
        codec_error=max(
            (error for error in errors if error is not None),
            key=lambda error: error.get("relative_rms", 0.0),
            default=None,
        ),
        withdrawn=withdrawn,
    )


def _check_distinct_ids(stores: Sequence[MemoryStore]) -> None:
    live = [np.delete(store.ids, list(store.manifest.withdrawn)) for store in stores]
    unique, counts = np.unique(np.concatenate(live), return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"PARTS share {int((counts > 1).sum())} passage ids: "
            f"{describe_numbers(unique[counts > 1])}. Withdraw them from all stores but one."
        )


def _copy_shard(source: ts.KvStore, entry: Shard, target: ts.KvStore, name: str) -> None:
    """Copies a shard under a new name; each file is checked, and the record is written last."""
    here = folder.subfolder(source, shard_folder(entry.name))
    there = folder.subfolder(target, shard_folder(name))
    record = _read_checked(here, manifest.RECORD, entry.record_sha256, entry.name)
    files = Record.from_bytes(record, f"{here.url}{manifest.RECORD}").files
    if folder.read_file(there, manifest.RECORD) == record and not shard.check_files(there, files):
        return
    for file, (size, sha256) in files.items():
        folder.write_file(there, file, _read_checked(here, file, sha256, entry.name, size))
    folder.write_file(there, manifest.RECORD, record)


def _read_checked(
    kvstore: ts.KvStore, file: str, sha256: str, name: str, size: int | None = None
) -> bytes:
    data = folder.read_file(kvstore, file, size)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedStore(
            f"{kvstore.url}{file} is missing or changed. Repair shard {name} with "
            "--run_mode=memory --action=repair, and merge again."
        )
    return data
