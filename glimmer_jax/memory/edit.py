"""Changes to a finished store: passages added, withdrawn, or a damaged shard rebuilt.

Each change is a new version of the manifest over shards that stay as they are, so a reader that has
opened the store keeps the version it has opened. A change that was stopped has changed nothing; run
again, it goes on with the shards it has finished.

Several stores made into one, by copying their shards; nothing is computed.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence

import numpy as np
import tensorstore as ts

from glimmer_jax.memory import build, build_plan, manifest, shard, versions
from glimmer_jax.memory.build import write, write_shards
from glimmer_jax.memory.encoding import Job, Recipe
from glimmer_jax.memory.maintain import check_shard
from glimmer_jax.memory.manifest import (
    LOCK,
    RECORD,
    Layout,
    Manifest,
    Record,
    Shard,
    check_identity,
    check_passages,
    shard_folder,
)
from glimmer_jax.memory.shard import Passages, read_source
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import with_progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)

# Passages whose texts are compared at a time: bounds RAM.
_COMPARE_ROWS = 4096
_GO_ON = "Append with the former settings, or accept it with ACCEPT_OTHER_PROGRAM = True."
_SAME_BYTES = "Repair it with the former settings, on the same kind of device."


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a passages folder has that a store has not."""

    new: np.ndarray  # rows of the folder whose ids the store does not have
    changed: np.ndarray  # rows of the folder whose ids the store has with another text


def compare(store: MemoryStore, passages: Passages) -> Difference:
    """Compares every passage, by its text and not by its id alone.

    Raises StopRequested where the process is asked to stop.
    """
    rows = store.rows(passages.ids, "mask")
    digests = store.digests()
    changed: list[int] = []
    known = np.flatnonzero(rows >= 0)
    for start in range(0, len(known), _COMPARE_ROWS):
        STOP.poll("Stopped before anything was changed. Run the same command again.")
        some = known[start : start + _COMPARE_ROWS]
        now = read_source(passages, some, store.manifest.identity.max_length).digests
        changed += some[now != digests[rows[some]]].tolist()
    return Difference(np.flatnonzero(rows < 0), np.array(changed, np.int64))


def append(
    recipe: Recipe,
    passages: Passages,
    path: folder.Path,
    *,
    passages_fingerprint: str,
    layout: Layout = Layout(shard_passages=1024, chunk_tokens=64),
    replace: bool = False,
    accept_other_program: bool = False,
) -> Manifest:
    """Adds the passages that the store does not have yet.

    Args:
      recipe: how to encode; it must be the store's own.
      passages: the corpus as it is now; passages that the store has are compared and skipped.
      path: the store.
      passages_fingerprint: of `passages`; recorded, since the store now covers them.
      layout: of the new shards.
      replace: withdraw passages whose text has changed and add them anew, and take back those
        that were withdrawn.
      accept_other_program: add what another program than the store's own computes; both are recorded.

    Raises:
      ValueError: the store was made by another encoder, vocabulary, codec or program, or texts of
        known ids have changed and `replace` is False.
      StopRequested: asked to stop; finished shards are kept.
    """
    build.check_ids(passages.ids)
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        store = MemoryStore.open(path)
        old = store.manifest
        where = f"{kvstore.url}manifest.json"
        check_identity(where, old.identity, recipe.identity)
        if old.programs and recipe.program not in old.programs and not accept_other_program:
            build_plan.check_program(where, old.programs[-1], recipe.program, _GO_ON)
        found = compare(store, passages)
        if found.changed.size and not replace:
            ids = passages.ids[found.changed]
            raise ValueError(
                f"{len(ids)} passages of the memory store {path} have another text in the passages "
                f"folder: {ids[:10].tolist()}. Set REPLACE=True to withdraw the old and add the "
                "new, or give the passages folder that the memory was built from."
            )
        rows = np.concatenate([found.new, found.changed])
        if not replace:
            # What was withdrawn on purpose does not come back by itself.
            rows = rows[~np.isin(passages.ids[rows], store.ids)]
        shards = build_plan.cut(rows, layout.shard_passages, _first_free(old))
        plan = build_plan.plan(
            kvstore,
            passages,
            shards,
            recipe,
            layout,
            accept_other_program=False,
            abandoned=True,
        )
        job = Job(recipe, passages, build.make_progress(plan.remaining_passages()))
        records = {**plan.finished, **dict(write_shards(kvstore, plan.todo, job, layout, lock))}
        gone = store.rows(passages.ids[found.changed])
        new = Manifest.of(
            old.identity,
            [*old.shards, *(Shard.of(item.name, records[item.name]) for item in shards)],
            version=old.version + 1,
            passages_fingerprints=[*old.passages_fingerprints, passages_fingerprint],
            codec_error=old.codec_error,
            withdrawn=[*old.withdrawn, *gone.tolist()],
        )
        return _put(kvstore, old, new, lock)


def withdraw(path: folder.Path, ids: Iterable[int]) -> Manifest:
    """Makes the store forget passages: their ids are unknown from the next version on.

    Their bytes stay, for readers of earlier versions.

    Raises:
      ValueError: an id is not in the store, or withdrawn already.
    """
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        store = MemoryStore.open(path)
        old = store.manifest
        rows = store.rows(np.unique(np.fromiter(ids, np.int64)))
        new = Manifest.of(
            old.identity,
            old.shards,
            version=old.version + 1,
            passages_fingerprints=old.passages_fingerprints,
            codec_error=old.codec_error,
            withdrawn=[*old.withdrawn, *rows[rows >= 0].tolist()],
        )
        return _put(kvstore, old, new, lock)


def repair(
    recipe: Recipe,
    passages: Passages,
    path: folder.Path,
    *,
    passages_fingerprint: str,
) -> list[str]:
    """Rebuilds damaged shards in their places, with the bytes they had.

    The manifest must be whole; everything else may be damaged.

    Returns:
      Names of the shards that were rebuilt.

    Raises:
      ValueError: encoder, program or passages are not those that the store was made with.
    """
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        found = versions.read_manifest(kvstore)
        where = f"{kvstore.url}manifest.json"
        check_identity(where, found.identity, recipe.identity)
        check_passages(found.passages_fingerprints, passages_fingerprint, path)
        damaged = []
        for entry in with_progress(found.shards, "verify", "shards"):
            STOP.poll("Stopped before anything was repaired. Run the same command again.")
            if check_shard(kvstore, entry):
                damaged.append(entry)
        for entry in damaged:
            logger.info("rebuilding shard %s", entry.name)
            name, stored = f"shard {entry.name} of {where}", entry.program
            build_plan.check_program(name, stored, recipe.program, _SAME_BYTES)
            job = Job(recipe, passages, build.make_progress(entry.passages))
            _rebuild(kvstore, found, entry, job, lock)
    return [entry.name for entry in damaged]


def _rebuild(
    kvstore: ts.KvStore, found: Manifest, entry: Shard, job: Job, lock: WriterLock
) -> None:
    rows = _rows_of(kvstore, found, entry, job.passages)
    (content,) = job.compute([(entry.name, rows)])
    # In RAM first: what is there is not touched unless it is replaced by what was there.
    scratch = ts.KvStore.open("memory://").result()
    record = write(scratch, content, job, entry.layout, None)
    if Shard.of(entry.name, record).record_sha256 != entry.record_sha256:
        raise _not_the_same(entry)
    # Written over file by file and never removed: stopped in between, what was whole still is.
    made, here = (folder.subfolder(kv, shard_folder(entry.name)) for kv in (scratch, kvstore))
    for name in (*record.files, RECORD):
        data = folder.read_file(made, name)
        assert data is not None
        lock.check()
        folder.write_file(here, name, data)


def _rows_of(kvstore: ts.KvStore, found: Manifest, entry: Shard, passages: Passages) -> np.ndarray:
    """Rows of the passages folder that a damaged shard was made from."""
    ids = _ids_of(kvstore, entry)
    if ids is None:
        return _rows_without_ids(kvstore, found, entry, passages)
    order = np.argsort(passages.ids, kind="stable")
    at = np.minimum(np.searchsorted(passages.ids, ids, sorter=order), len(passages) - 1)
    rows = order[at]
    if len(ids) != entry.passages or (passages.ids[rows] != ids).any():
        raise _not_the_same(entry)
    return rows


def _ids_of(kvstore: ts.KvStore, entry: Shard) -> np.ndarray | None:
    """The ids of a shard; None where they are damaged, too."""
    here = folder.subfolder(kvstore, shard_folder(entry.name))
    try:
        return shard.open_array(here, shard.IDS, ts.Context()).result().read().result()
    except ValueError as error:
        if not folder.is_damage(error):
            raise storage_error(here.url, error) from error
        return None


def _rows_without_ids(
    kvstore: ts.KvStore, found: Manifest, entry: Shard, passages: Passages
) -> np.ndarray:
    """Rows of the passages folder that no whole shard has, as many as the shard has, in order.

    In a store that was only ever built those are its own rows; so they are where passages were added
    to the folder's end, or to a store that was merged from parts of it.
    """
    known = {one.name: _ids_of(kvstore, one) for one in found.shards}
    others = [ids for ids in known.values() if ids is not None]
    missing = np.flatnonzero(
        ~np.isin(passages.ids, np.concatenate([*others, np.empty(0, np.int64)]))
    )
    # Of several shards without ids, those that come first take the first rows.
    start = 0
    for one in found.shards:
        if one.name == entry.name:
            break
        start += one.passages if known[one.name] is None else 0
    rows = missing[start : start + entry.passages]
    if len(rows) != entry.passages:
        raise ValueError(
            f"The ids of shard {entry.name} are damaged, and the passages folder has {len(missing)} "
            "passages that no whole shard has: which of them it held cannot be told. Copy the shard's "
            "folder `ids` back from elsewhere, or build the memory again."
        )
    return rows


def _not_the_same(entry: Shard) -> ValueError:
    return ValueError(
        f"Shard {entry.name} came out with other bytes than it had: these passages or this machine "
        "are not those that it was made with. Repair it where it was made, or build the memory "
        "again."
    )


def _first_free(found: Manifest) -> int:
    """Number of the first shard name that no shard of the store has."""
    numbers = [int(entry.name) for entry in found.shards if entry.name.isdigit()]
    return max(numbers, default=-1) + 1


def _put(kvstore: ts.KvStore, old: Manifest, new: Manifest, lock: WriterLock) -> Manifest:
    same = dataclasses.replace(new, version=old.version) == old
    if same:
        logger.info("nothing to change: version %d has it all", old.version)
        return old
    versions.replace_manifest(kvstore, old, new, lock)
    return new


def merge(parts: Sequence[folder.Path], path: folder.Path) -> Manifest:
    """Writes the store at `path`: the rows of all parts, in order.

    A merge that was stopped goes on with the shards it has not copied.

    Args:
      parts: finished stores of one encoder, vocabulary, codec and length.
      path: where there is no finished store yet.

    Raises:
      ValueError: fewer than two parts, parts that do not belong together or share ids, or a store
        at `path`.
      DamagedStore: a file of a part is missing or changed.
    """
    if len(parts) < 2:
        raise ValueError(f"A merge needs two stores or more in PARTS, got {list(parts)}.")
    stores = [MemoryStore.open(part) for part in parts]
    first = stores[0].manifest
    for store in stores[1:]:
        check_identity(str(store.path), store.manifest.identity, first.identity)
    _check_ids(stores)
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        if folder.read_file(kvstore, manifest.MANIFEST) is not None:
            raise ValueError(
                f"There is a finished memory store at {path} already. Merge into another folder."
            )
        shards: list[Shard] = []
        withdrawn: list[int] = []
        row = 0
        for store in stores:
            withdrawn += [row + gone for gone in store.manifest.withdrawn]
            row += len(store)
            for entry in store.manifest.shards:
                name = build_plan.shard_name(len(shards))
                STOP.poll("Stopped between two shards. Run the same command again to resume.")
                lock.check()
                shards.append(_copy(store.kvstore, entry, kvstore, name))
        errors = [store.manifest.codec_error for store in stores]
        found = Manifest.of(
            first.identity,
            shards,
            version=1,
            passages_fingerprints=[
                fingerprint
                for store in stores
                for fingerprint in store.manifest.passages_fingerprints
            ],
            # The worst of them; each was measured on a sample of its own.
            codec_error=max(
                (error for error in errors if error is not None),
                key=lambda error: error["relative_rms"],
                default=None,
            ),
            withdrawn=withdrawn,
        )
        lock.check()
        versions.keep_manifest(kvstore, found)
        folder.write_file(kvstore, manifest.MANIFEST, found.to_bytes())
    return found


def _check_ids(stores: Sequence[MemoryStore]) -> None:
    live = [np.delete(store.ids, list(store.manifest.withdrawn)) for store in stores]
    unique, counts = np.unique(np.concatenate(live), return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{int((counts > 1).sum())} passage ids are in more than one of the stores: "
            f"{unique[counts > 1][:10].tolist()}. Withdraw them from all but one."
        )


def _copy(source: ts.KvStore, entry: Shard, target: ts.KvStore, name: str) -> Shard:
    """Copies a shard under a new name, each file checked on its way; the record comes last."""
    here = folder.subfolder(source, shard_folder(entry.name))
    there = folder.subfolder(target, shard_folder(name))
    data = _read(here, manifest.RECORD, entry.record_sha256, entry.name)
    placed = Shard.of(name, Record.from_bytes(data, f"{here.url}{manifest.RECORD}"))
    files = Record.from_bytes(data, f"{here.url}{manifest.RECORD}").files
    if folder.read_file(there, manifest.RECORD) == data and not shard.check_files(there, files):
        return placed
    for file, (_, sha256) in files.items():
        folder.write_file(there, file, _read(here, file, sha256, entry.name))
    folder.write_file(there, manifest.RECORD, data)
    return placed


def _read(kvstore: ts.KvStore, file: str, sha256: str, name: str) -> bytes:
    data = folder.read_file(kvstore, file)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise manifest.DamagedStore(
            f"{kvstore.url}{file} is missing or changed. Repair shard {name} with "
            "--run_mode=memory --action=repair, and merge again."
        )
    return data
