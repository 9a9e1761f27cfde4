"""Maintenance of a finished store: inspect it, find passages, verify checksums, repair shards.

Reading checks the bytes that it uses. Only `verify` reads all bytes: it also detects damage in
passages that were never read and in the `zarr.json` files, which the store does not need, and parts
of one build's arrays in the files of another. `repair` rebuilds damaged shards with their original
bytes.
"""

import hashlib
import logging
from typing import Any

import numpy as np
import tensorstore as ts

from glimmer_jax.corpus.ids import is_hash
from glimmer_jax.memory import build, build_plan, shard, versions
from glimmer_jax.memory.build import write_shard
from glimmer_jax.memory.encoding import MemoryEncoder, ShardEncoder
from glimmer_jax.memory.manifest import (
    LOCK,
    MANIFEST,
    RECORD,
    Manifest,
    Record,
    Shard,
    check_identity,
    check_passages,
    describe,
    shard_folder,
)
from glimmer_jax.memory.shard import IDS, ArrayFormat
from glimmer_jax.memory.source import Passages
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import with_progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)

_REMEDY = "Repair it with the former settings, on the same kind of device."


def inspect(store: MemoryStore) -> dict[str, Any]:
    """A summary of the store as JSON values."""
    manifest, identity = store.manifest, store.manifest.identity
    return {
        "path": str(store.path),
        "version": manifest.version,
        "passages": manifest.num_passages - len(manifest.withdrawn),
        "withdrawn": len(manifest.withdrawn),
        "tokens": manifest.num_tokens,
        "bytes": manifest.num_bytes,
        "bytes_per_token": round(manifest.num_bytes / max(manifest.num_tokens, 1), 1),
        "shards": len(manifest.shards),
        "longest": manifest.longest,
        "truncated": manifest.truncated,
        "max_length": identity.max_length,
        "emb_dim": identity.emb_dim,
        "codec": identity.codec,
        "codec_error": manifest.codec_error,
        "encoder_fingerprint": identity.encoder_fingerprint,
        "vocabulary_fingerprint": identity.vocabulary_fingerprint,
        "passages_fingerprints": list(manifest.passages_fingerprints),
        "programs": [describe(program) for program in manifest.programs],
        "layouts": [describe(layout) for layout in manifest.layouts],
    }


def find(store: MemoryStore, query: int | str) -> list[dict[str, Any]]:
    """Passages by id, or by title: equal titles or, if there are none, titles that contain the words.

    Returns:
      `{"id", "title", "tokens", "row", "shard", "withdrawn"}` of each, in the order of rows. The store
      does not hold string ids: for these `id` is None, and `number` stands for it in IDS.

    Raises:
      ValueError: there is no such passage.
    """
    withdrawn = set(store.manifest.withdrawn)
    equal, similar = [], []
    for entry in store.manifest.shards:
        rows = np.arange(entry.first_row, entry.first_row + entry.passages)
        if isinstance(query, int):
            rows = rows[store.ids[rows] == query]
            if not rows.size:
                continue
        titles = store.titles(entry)
        for row in rows.tolist():
            title = titles[row - entry.first_row]
            number = int(store.ids[row])
            passage = {
                **({"id": None, "number": number} if is_hash(number) else {"id": number}),
                "title": title,
                "tokens": int(store.lengths[row]),
                "row": row,
                "shard": entry.name,
                "withdrawn": row in withdrawn,
            }
            if isinstance(query, int) or title == query:
                equal.append(passage)
            elif query.casefold() in title.casefold():
                similar.append(passage)
    if not equal and not similar:
        raise ValueError(
            f"No passage {query!r} in the memory store {store.path}. Give an id, a title or a part "
            "of one."
        )
    return equal or similar


def verify(path: folder.Path, sample: int | None = None, version: int | None = None) -> list[str]:
    """Compares the files of a store with their SHA-256.

    Args:
      path: the store; only its manifest must be intact.
      version: an earlier version of the store; default: the newest.
      sample: number of shards to read, evenly spaced; None reads all.

    Returns:
      One line for each problem.

    Raises:
      ValueError: there is no finished store, no such version, or `sample` is less than 1.
      DamagedStore: the manifest is damaged.
      OSError: the storage did not answer.
      StopRequested: a stop was requested.
    """
    kvstore = folder.open_folder(path)
    entries = versions.read_manifest(kvstore, version).shards
    if sample is not None and sample < len(entries):
        if sample < 1:
            raise ValueError(
                f"VERIFY_SHARDS must be at least 1, got {sample}. Give None to read all shards."
            )
        chosen = np.unique(np.linspace(0, len(entries) - 1, sample).astype(np.int64))
        entries = tuple(entries[i] for i in chosen)
    problems = []
    for entry in with_progress(entries, "verify", "shards"):
        STOP.poll()
        found = check_shard(kvstore, entry).values()
        problems += [f"{shard_folder(entry.name)}/{problem}" for problem in found]
    return problems


def check_shard(store: ts.KvStore, entry: Shard) -> dict[str, str]:
    """Problems with the files of one shard of the store in folder `store`, by file."""
    here = folder.subfolder(store, shard_folder(entry.name))
    record = _intact_record(here, entry)
    if isinstance(record, str):
        return {RECORD: record}
    return shard.check_files(here, record.files)


def _intact_record(here: ts.KvStore, entry: Shard) -> Record | str:
    """The record that the manifest names, or the problem with the one in the shard's folder."""
    data = folder.read_file(here, RECORD)
    if data is None:
        return f"{RECORD} is missing"
    if hashlib.sha256(data).hexdigest() != entry.record_sha256:
        return f"{RECORD} has been changed: its SHA-256 differs"
    return Record.from_bytes(data, f"{here.url}{RECORD}")


def incomplete_files(store: MemoryStore) -> list[str]:
    """Missing and truncated files, without reading the others; one line for each."""
    return [
        f"{shard_folder(entry.name)}/{problem}"
        for entry, record in zip(store.manifest.shards, store.records(), strict=True)
        for problem in shard.check_sizes(
            folder.subfolder(store.kvstore, shard_folder(entry.name)), record.files
        )
    ]


def repair(
    encoder: MemoryEncoder,
    passages: Passages,
    path: folder.Path,
    *,
    passages_fingerprint: str,
) -> list[str]:
    """Rebuilds damaged shards in place, with the bytes they had.

    The manifest must be intact. Only missing and damaged files are written, each atomically, so a
    repair that was stopped has removed nothing and can be rerun.

    Returns:
      Names of the rebuilt shards.

    Raises:
      ValueError: encoder, program or passages are not those that the store was built with.
      OSError: the storage failed.
      StopRequested: a stop was requested.
    """
    kvstore = folder.open_folder(path)
    with WriterLock(kvstore, LOCK) as lock:
        stored = versions.read_manifest(kvstore)
        where = f"{kvstore.url}{MANIFEST}"
        check_identity(where, stored.identity, encoder.identity)
        check_passages(stored.passages_fingerprints, passages_fingerprint, path)
        damaged = []
        for entry in with_progress(stored.shards, "verify", "shards"):
            STOP.poll("Stopped before anything was repaired. Rerun the same command.")
            if check_shard(kvstore, entry):
                damaged.append(entry)
        for entry in damaged:
            logger.info("rebuilding shard %s", entry.name)
            name = f"shard {entry.name} of {where}"
            build_plan.check_program(name, entry.program, encoder.program, _REMEDY)
            shard_encoder = ShardEncoder(encoder, passages, build.encode_progress(entry.passages))
            _rebuild(kvstore, stored, entry, shard_encoder, lock)
    return [entry.name for entry in damaged]


def _rebuild(
    kvstore: ts.KvStore, stored: Manifest, entry: Shard, encoder: ShardEncoder, lock: WriterLock
) -> None:
    rows = _rows_of(kvstore, stored, entry, encoder.passages)
    (content,) = encoder.compute([(entry.name, rows)])
    # Built in RAM first: files are only replaced by the bytes that they had.
    scratch = ts.KvStore.open("memory://").result()
    record = write_shard(scratch, content, encoder.encoder, entry.layout, None)
    if Shard.of(entry.name, record).record_sha256 != entry.record_sha256:
        raise _other_bytes(entry)
    rebuilt, here = (folder.subfolder(kv, shard_folder(entry.name)) for kv in (scratch, kvstore))
    for name in [*shard.check_files(here, record.files), RECORD]:
        data = folder.read_file(rebuilt, name)
        assert data is not None
        # Intact files are left alone: a write that is killed leaves a temporary file, which only
        # the next write of the same file removes.
        if folder.read_file(here, name, len(data)) != data:
            lock.check()
            folder.write_file(here, name, data)


def _rows_of(kvstore: ts.KvStore, stored: Manifest, entry: Shard, passages: Passages) -> np.ndarray:
    """Rows of the passages folder that a damaged shard was built from."""
    ids = _intact_ids(kvstore, entry)
    if ids is None:
        return _rows_without_ids(kvstore, stored, entry, passages)
    order = np.argsort(passages.ids, kind="stable")
    at = np.minimum(np.searchsorted(passages.ids, ids, sorter=order), len(passages) - 1)
    rows = order[at]
    if (passages.ids[rows] != ids).any():
        raise _other_bytes(entry)
    return rows


def _intact_ids(kvstore: ts.KvStore, entry: Shard) -> np.ndarray | None:
    """The ids of a shard; None if they are damaged or those of another shard."""
    here = folder.subfolder(kvstore, shard_folder(entry.name))
    record = _intact_record(here, entry)
    files = {} if isinstance(record, str) else record.files
    if shard.check_files(here, {k: v for k, v in files.items() if k.startswith(f"{IDS}/c/")}):
        return None
    # With a damaged record, their checksums of chunks must do; a wrong choice gives another record.
    format_ = ArrayFormat.of((entry.passages,), np.dtype(np.int64), entry.passages)
    try:
        return shard.open_array(here, IDS, format_, ts.Context()).result().read().result()
    except ValueError as error:
        if not folder.is_damage(error):
            raise storage_error(here.url, error) from error
        return None


def _rows_without_ids(
    kvstore: ts.KvStore, stored: Manifest, entry: Shard, passages: Passages
) -> np.ndarray:
    """Rows of the passages folder that no shard with intact ids has, in order.

    In a store that was only built those are the shard's own rows; also if passages were appended at
    the end of the folder, or if the store was merged from parts of the folder.
    """
    intact = {other.name: _intact_ids(kvstore, other) for other in stored.shards}
    others = [ids for ids in intact.values() if ids is not None]
    missing = np.flatnonzero(
        ~np.isin(passages.ids, np.concatenate([*others, np.empty(0, np.int64)]))
    )
    # Among shards without ids, earlier ones have earlier rows.
    start = 0
    for other in stored.shards:
        if other.name == entry.name:
            break
        start += other.passages if intact[other.name] is None else 0
    rows = missing[start : start + entry.passages]
    if len(rows) != entry.passages:
        raise ValueError(
            f"The ids of shard {entry.name} are damaged, and the passages folder has {len(missing)} "
            f"passages that no intact shard has, of which the shard needs {entry.passages} from "
            f"number {start} on. Restore the shard's folder `ids` from a copy, or rebuild the memory."
        )
    return rows


def _other_bytes(entry: Shard) -> ValueError:
    return ValueError(
        f"Shard {entry.name} was rebuilt with other bytes than it had: these passages or this machine "
        "are not those that it was built with. Repair it where it was built, or rebuild the memory."
    )
