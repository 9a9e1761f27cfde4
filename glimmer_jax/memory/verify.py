"""Every byte of a store against its checksums."""

import hashlib

import numpy as np
import tensorstore as ts

from glimmer_jax import folder
from glimmer_jax.memory import manifest, shard
from glimmer_jax.memory.manifest import Record, Shard
from glimmer_jax.memory.progress import counted
from glimmer_jax.memory.store import MemoryStore


def verify(store: MemoryStore, sample: int | None = None) -> list[str]:
    """What is wrong with the files of a store, a line each.

    Args:
      store: the store.
      sample: shards to read, evenly spaced; None reads all.

    Raises:
      OSError: the storage did not answer.
    """
    entries = store.manifest.shards
    if sample is not None and sample < len(entries):
        if sample < 1:
            raise ValueError(
                f"VERIFY_SHARDS must be at least 1, got {sample}. Give None to read all shards."
            )
        chosen = np.unique(np.linspace(0, len(entries) - 1, sample).astype(np.int64))
        entries = tuple(entries[i] for i in chosen)
    return [
        problem
        for entry in counted(entries, "shards read")
        for problem in check_shard(store.kvstore, entry)
    ]


def check_shard(store: ts.KvStore, entry: Shard) -> list[str]:
    """What is wrong with the files of one shard of the store in folder `store`."""
    where = f"{manifest.shard_folder(entry.name)}/"
    kvstore = folder.subfolder(store, manifest.shard_folder(entry.name))
    data = folder.read_file(kvstore, manifest.RECORD)
    if data is None:
        return [f"{where}{manifest.RECORD} is missing"]
    if hashlib.sha256(data).hexdigest() != entry.record_sha256:
        return [f"{where}{manifest.RECORD} has been changed: its SHA-256 differs"]
    files = Record.from_bytes(data, f"{where}{manifest.RECORD}").files
    return [where + problem for problem in shard.check_files(kvstore, files)]
