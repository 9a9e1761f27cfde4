"""Several stores made into one, by copying their shards; nothing is computed."""

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from glimmer_jax import folder
from glimmer_jax.lock import WriterLock
from glimmer_jax.memory import manifest, resume, shard, versions
from glimmer_jax.memory.identity import check_identity
from glimmer_jax.memory.manifest import LOCK, Manifest, Record, Shard, shard_folder
from glimmer_jax.memory.store import MemoryStore


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
                name = resume.shard_name(len(shards))
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
