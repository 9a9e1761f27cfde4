"""What is in a store, by whom it was made, and how large it is."""

from typing import Any

import numpy as np

from glimmer_jax.memory.identity import describe
from glimmer_jax.memory.store import MemoryStore


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
