"""The benchmarks of the memory, on the smallest stores: what they read and compare is what they say."""

import json

import numpy as np
import pytest

from benchmarks import memory_lookup, memory_speed
from glimmer_jax.memory.store import MemoryStore


def test_the_raw_readers_read_the_bytes_of_the_rows(tmp_path):
    path = tmp_path / "s"
    memory_lookup._build(path, "bf16", passages=20, tokens=100, emb_dim=4)
    store = MemoryStore.open(path)
    rows = np.array([3, 4, 11])
    states, _ = store.read(rows, 100)
    extents = memory_lookup.chunks(path, store, rows)
    # Rows 3 and 4 share a chunk, and are one piece: tokens 300 to 499, in chunks of 64.
    assert len(extents) == 2 and extents[0][2] == 4 * (64 * 8 + 4)
    (file, begin, size) = extents[0]
    data = file.read_bytes()[begin : begin + size]
    chunks = [data[i : i + 64 * 8] for i in range(0, size, 64 * 8 + 4)]
    start = (300 - 256) * 8
    assert b"".join(chunks)[start : start + 1600] == states["states"][:2].tobytes()


def test_every_codec_reader_and_state_has_a_figure(tmp_path, monkeypatch):
    # Not for the rest of this process.
    monkeypatch.setattr(memory_lookup, "keep_freed_memory", lambda: None)
    out = tmp_path / "out.json"
    small = "--passages 8 --tokens 9 --emb_dim 16 --batches 2 --batch 3 --rounds 1"
    memory_lookup.main([*small.split(), "--folder", str(tmp_path), "--json", str(out)])
    found = json.loads(out.read_text())
    states = {(row["reader"], row["state"]) for row in found if row["codec"] == "pq"}
    assert len(found) == 24 and len(states) == 8
    assert all(row["rows_per_s"] > 0 and row["mb_per_s"] > 0 for row in found)


@pytest.mark.slow
def test_the_job_is_compared_with_its_encoder(tmp_path):
    out = tmp_path / "out.json"
    small = "--codecs int8 --size tiny --passages 6 --shard_passages 4 --rows 2 --rounds 1"
    memory_speed.main([*small.split(), "--folder", str(tmp_path), "--json", str(out)])
    (row,) = json.loads(out.read_text())
    speeds = [row[f"{name}_tokens_per_s"] for name in ("states", "encode", "job")]
    assert row["of_encode"] > 0 and min(speeds) > 0
    assert abs(row["of_states"] - speeds[2] / speeds[0]) < 0.01
