"""Every byte of a store against its checksums.

What is in a store, by whom it was made, and how large it is.
"""

import hashlib
from typing import Any

import numpy as np
import tensorstore as ts

from glimmer_jax.memory import manifest, shard
from glimmer_jax.memory.manifest import Record, Shard, describe
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import with_progress
from glimmer_jax.storage import folder


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
    problems = []
    for entry in with_progress(entries, "verify", "shards"):
        STOP.poll("Stopped before all shards were verified. Run the same command again.")
        problems += check_shard(store.kvstore, entry)
    return problems


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


def inspect(store: MemoryStore) -> dict[str, Any]:
    """The store in plain JSON values."""
    found, made = store.manifest, store.manifest.identity
    return {
        "path": str(store.path),
        "version": found.version,
        "passages": found.num_passages - len(found.withdrawn),
        "withdrawn": len(found.withdrawn),
        "tokens": found.num_tokens,
        "bytes": found.num_bytes,
        "bytes_per_token": round(found.num_bytes / max(found.num_tokens, 1), 1),
        "shards": len(found.shards),
        "longest": found.longest,
        "truncated": found.truncated,
        "max_length": made.max_length,
        "emb_dim": made.emb_dim,
        "codec": made.codec,
        "codec_error": found.codec_error,
        "encoder_fingerprint": made.encoder_fingerprint,
        "vocabulary_fingerprint": made.vocabulary_fingerprint,
        "passages_fingerprints": list(found.passages_fingerprints),
        "programs": [describe(program) for program in found.programs],
        "layouts": [describe(layout) for layout in found.layouts],
    }


def find(store: MemoryStore, wanted: int | str) -> list[dict[str, Any]]:
    """Passages by id, or by a title that is equal or, if none is, contains the words.

    Returns:
      `{"id", "title", "tokens", "row", "shard", "withdrawn"}` of each, in the order of rows.

    Raises:
      ValueError: there is no such passage.
    """
    withdrawn = set(store.manifest.withdrawn)
    found, similar = [], []
    for entry in store.manifest.shards:
        rows = np.arange(entry.first_row, entry.first_row + entry.passages)
        if isinstance(wanted, int):
            rows = rows[store.ids[rows] == wanted]
            if not rows.size:
                continue
        titles = store.titles(entry)
        for row in rows.tolist():
            title = titles[row - entry.first_row]
            line = {
                "id": int(store.ids[row]),
                "title": title,
                "tokens": int(store.lengths[row]),
                "row": row,
                "shard": entry.name,
                "withdrawn": row in withdrawn,
            }
            if isinstance(wanted, int) or title == wanted:
                found.append(line)
            elif wanted.casefold() in title.casefold():
                similar.append(line)
    if not found and not similar:
        raise ValueError(
            f"No passage {wanted!r} in the memory store {store.path}. Give an id, a title or a part "
            "of one."
        )
    return found or similar
