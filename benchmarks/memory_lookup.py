"""Lookup from disk compared with the raw device: rows and bytes per second, cold, warm and cached.

    python -m benchmarks.memory_lookup [--codecs bf16,int8,pq] [--folder DIR] [--json OUT]

For each codec, builds a store of random passages and reads random rows in batches of questions times
passages, no row twice: with the lookup (indices, checksums, padded arrays), and the bytes of the same
chunks with a memory map and with reading threads.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.memory import ROWS, RandomPassages
from glimmer_jax import codecs
from glimmer_jax.memory import table
from glimmer_jax.memory.build import BuildConfig, build_memory
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.lookup import DiskLookup
from glimmer_jax.memory.manifest import EncodeProgram, Identity, Layout, shard_folder
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.runtime.host_memory import keep_freed_memory

LAYOUT = Layout(shard_passages=1024, chunk_tokens=64)
THREADS = 16
# (file, first byte, bytes)
Extent = tuple[Path, int, int]


def main(argv: Sequence[str] | None = None) -> None:
    """Builds and reads the stores, and prints a row per codec, reader and state."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codecs", default="bf16,int8,pq")
    parser.add_argument("--passages", type=int, default=4096, help="in the store")
    parser.add_argument("--tokens", type=int, default=200, help="of a passage")
    parser.add_argument("--emb_dim", type=int, default=768)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=320, help="rows: questions times passages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the device to measure; default: temporary")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    keep_freed_memory()
    if args.batches * args.batch > args.passages:
        parser.error("--passages must be at least --batches x --batch, since no row is read twice.")
    rows = []
    for codec in args.codecs.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / codec
            _build(path, codec, args.passages, args.tokens, args.emb_dim)
            rows += measure(path, codec, args.tokens, args.batches, args.batch, args.rounds)
    for row in rows:
        print(
            "{codec:5} {reader:12} {state:7} {rows_per_s:10.0f} rows/s {mb_per_s:8.1f} MB/s".format(
                **row
            )
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _build(path: Path, codec: str, passages: int, tokens: int, emb_dim: int) -> None:
    """A store whose arrays are random bytes."""
    draw = np.random.default_rng(0)
    specs = codecs.get(codec).array_specs(emb_dim)

    def encode(batch: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        arrays = {}
        for name, (trailing, dtype) in specs.items():
            shape = (*batch.shape, *trailing)
            size = int(np.prod(shape)) * dtype.itemsize
            arrays[name] = np.frombuffer(draw.bytes(size), dtype).reshape(shape)
        return arrays, np.ones(batch.shape, bool)

    build_memory(
        MemoryEncoder(
            encode,
            Identity("sha256:random", "sha256:none", codec, emb_dim, tokens),
            EncodeProgram(ROWS, (tokens,), "float32", None, jax.default_backend(), jax.__version__),
        ),
        RandomPassages(np.ones((passages, tokens), np.int32)),
        path,
        passages_fingerprint="sha256:random",
        config=BuildConfig(LAYOUT),
    )


def measure(
    path: Path, codec: str, length: int, batches: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians over rounds with interleaved readers; every round reads other rows.

    Returns:
      `{codec, reader, state, rows_per_s, mb_per_s}`; all readers count the bytes of the chunks on disk.
      `cold`: the files were dropped from the page cache. `warm`: they are in the page cache.
      `cached`: the lookup with rows in its store's cache. `loaded`: all rows onto the devices, from
      a cold disk.
    """
    draw = np.random.default_rng(1)
    store = MemoryStore.open(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    seconds: dict[tuple[str, str], list[float]] = {}
    sizes: list[int] = []
    for _ in range(rounds):
        rows = draw.permutation(len(store))[: batches * batch].reshape(batches, batch)
        extents = [chunks(path, store, batch_rows) for batch_rows in rows]
        sizes.append(sum(size for batch in extents for _, _, size in batch))

        readers: dict[str, Callable[[], None]] = {
            "lookup": functools.partial(_look_up, path, length, rows),
            "memory map": functools.partial(_read_mapped, extents),
            "threads": functools.partial(_read_threaded, extents),
        }
        for name, read in readers.items():
            for state in ("cold", "warm"):
                if state == "cold":
                    _drop(files)
                seconds.setdefault((name, state), []).append(_timed(read))
        again = DiskLookup(MemoryStore.open(path, cache_bytes=4 << 30), length)
        again(rows[0][None])
        once = _timed(functools.partial(again, rows[0][None]))
        seconds.setdefault(("lookup", "cached"), []).append(once * batches)
    mesh = make_mesh(MeshConfig(), jax.devices())
    loads = []
    for _ in range(rounds):
        _drop(files)
        loads.append(
            _timed(lambda: jax.block_until_ready(table.load(MemoryStore.open(path), mesh).pages))
        )
    load = statistics.median(loads)
    size = statistics.median(sizes)
    loaded = {
        "codec": codec,
        "reader": "mesh table",
        "state": "loaded",
        "rows_per_s": len(store) / load,
        "mb_per_s": store.manifest.num_bytes / load / 1e6,
    }
    return [
        {
            "codec": codec,
            "reader": name,
            "state": state,
            "rows_per_s": batches * batch / statistics.median(times),
            "mb_per_s": size / statistics.median(times) / 1e6,
        }
        for (name, state), times in seconds.items()
    ] + [loaded]


def _look_up(path: Path, length: int, batches: np.ndarray) -> None:
    # Reopened, without caches of the previous round.
    lookup = DiskLookup(MemoryStore.open(path), length)
    for rows in batches:
        lookup(rows[None])


def chunks(path: Path, store: MemoryStore, rows: np.ndarray) -> list[Extent]:
    """Extents of the chunks that hold `rows`, from the index of each array's only file."""
    extents: list[Extent] = []
    starts = np.concatenate([[0], np.cumsum(store.lengths)])
    for entry in store.manifest.shards:
        here = rows[(rows >= entry.first_row) & (rows < entry.first_row + entry.passages)]
        if not here.size:
            continue
        first = starts[here] - starts[entry.first_row]
        wanted = set()
        for begin, count in zip(first.tolist(), store.lengths[here].tolist(), strict=True):
            last = (begin + count - 1) // LAYOUT.chunk_tokens
            wanted |= set(range(begin // LAYOUT.chunk_tokens, last + 1))
        identity = store.manifest.identity
        for name in codecs.get(identity.codec).array_specs(identity.emb_dim):
            array = path / shard_folder(entry.name) / name / "c"
            (file,) = (path for path in array.rglob("*") if path.is_file())
            count = -(-entry.tokens // LAYOUT.chunk_tokens)
            # The index is at the end: first byte and size of each chunk, then its checksum.
            index = np.fromfile(file, "<u8", 2 * count, offset=file.stat().st_size - 16 * count - 4)
            for begin, size in sorted(index.reshape(-1, 2)[sorted(wanted)].tolist()):
                if extents and extents[-1][0] == file and sum(extents[-1][1:]) == begin:
                    # Merge adjacent chunks.
                    _, begin, before = extents.pop()
                    size += before
                extents.append((file, begin, size))
    return extents


def _read_mapped(extents: Sequence[Sequence[Extent]]) -> None:
    maps: dict[Path, np.memmap] = {}
    for batch in extents:
        for file, begin, size in batch:
            if file not in maps:
                maps[file] = np.memmap(file, np.uint8, "r")
            np.array(maps[file][begin : begin + size])


def _read_threaded(extents: Sequence[Sequence[Extent]]) -> None:
    opened = {
        file: os.open(file, os.O_RDONLY)
        for file in {extent[0] for batch in extents for extent in batch}
    }

    def read(part: Sequence[Extent]) -> None:
        for file, begin, size in part:
            os.pread(opened[file], size, begin)

    try:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for batch in extents:
                list(pool.map(read, (batch[i::THREADS] for i in range(THREADS))))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _drop(files: Sequence[Path]) -> None:
    """Drops files from the page cache, after writing them back."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _timed(run: Callable[[], Any]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
