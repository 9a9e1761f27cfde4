"""The job that encodes a corpus into an index, or goes on with one.

As the memory's job: shards of consecutive rows, each whole or not there, the record that makes one
count written after its vectors, the manifest last. Killed and started again it goes on with the
first shard without record, and ends with the same bytes for the same program and shard size.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import manifest, shard
from glimmer_jax.memory.build_plan import Builders, Todo, cut, wait_for_records
from glimmer_jax.retrieval import index
from glimmer_jax.retrieval.index import Identity, Index, Manifest, Record
from glimmer_jax.retrieval.text_encoder import TextEncoder, passage_text
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)

SHARD_PASSAGES = 32768  # 48 MiB of vectors of 768


def texts_fingerprint(passages_manifest: Mapping[str, Any]) -> str:
    """`sha256:…` over ids and texts of a passages folder, by the checksums in its manifest."""
    files = passages_manifest["files"]
    sums = json.dumps([files[name]["sha256"] for name in ("ids.npy", "passages.jsonl")])
    return f"sha256:{hashlib.sha256(sums.encode()).hexdigest()}"


def identity_of(passages: Passages, encoder: TextEncoder) -> Identity:
    """The identity of an index that `encoder` makes of `passages`."""
    loaded = encoder.loaded
    return Identity(
        encoder=loaded.fingerprint,
        vocabulary=loaded.vocabulary_fingerprint,
        passages=texts_fingerprint(passages.manifest),
        max_length=loaded.max_length,
        vector_dim=loaded.vector_dim,
    )


def build_index(
    path: folder.Path,
    passages: Passages,
    encoder: TextEncoder,
    *,
    shard_passages: int = SHARD_PASSAGES,
    builders: Builders = Builders(),
) -> Index:
    """The index at `path`: opened where it is finished, else made or gone on with.

    Args:
      path: a local folder, a TensorStore URL or spec; created if missing.
      passages: the corpus; row i becomes row i of the index.
      encoder: of the vectors.
      shard_passages: passages a shard; at most three shards are in RAM.
      builders: who this is, where several processes make one index at a time.

    Raises:
      ValueError: what is at `path` belongs to another encoder, to other passages (both are named) or
        to another layout, another writer is at work, or the encoder gave NaN or infinity.
      OSError: the storage failed; finished shards are kept.
      StopRequested: asked to stop; finished shards are kept.
    """
    kvstore = folder.open_folder(path)
    identity = identity_of(passages, encoder)
    found = index.read_manifest(kvstore)
    if found is not None:
        identity.check(kvstore.url, found.identity)
        # A finished index may be cut otherwise, and may lie where nobody can write.
        shards = [Todo(name, np.arange(count)) for name, count, _ in found.shards]
        if not _plan(kvstore, shards, identity)[0]:
            return Index(kvstore, found)
    shards = cut(np.arange(len(passages)), shard_passages)
    mine = builders.own(shards)
    with builders.lock(kvstore, index.LOCK) as lock:
        todo, records = _plan(kvstore, mine, identity)
        if records:
            logger.info("%d of %d shards of the index are already there", len(records), len(mine))
        progress = Progress("index", sum(len(item.rows) for item in todo), "passages")
        job = _Job(kvstore, passages, encoder, identity, progress, lock)
        records |= dict(job.run(todo))
        progress.log()
        others = [item for item in shards if item.name not in records]
        read = functools.partial(_read_own, kvstore, identity)
        records |= wait_for_records(others, read, builders)
        made = Manifest.of({item.name: records[item.name] for item in shards})
        if builders.index == 0:
            lock.check()
            folder.write_file(kvstore, manifest.MANIFEST, made.to_bytes())
    return Index(kvstore, made)


def _plan(
    kvstore: ts.KvStore, shards: Sequence[Todo], identity: Identity
) -> tuple[list[Todo], dict[str, Record]]:
    """Shards to make, and the records of those that are finished."""
    todo, finished = [], {}
    for item in shards:
        record = _read_own(kvstore, identity, item)
        here = folder.subfolder(kvstore, manifest.shard_folder(item.name))
        if record is None:
            todo.append(item)
        elif problems := shard.check_sizes(here, record.files):
            logger.warning("making shard %s again: %s", item.name, "; ".join(problems))
            todo.append(item)
        else:
            finished[item.name] = record
    return todo, finished


def _read_own(kvstore: ts.KvStore, identity: Identity, item: Todo) -> Record | None:
    """The record of a finished shard of this job. Raises ValueError for one of another."""
    record = index.read_record(kvstore, item.name)
    if record is None:
        return None
    identity.check(f"{kvstore.url}{manifest.shard_folder(item.name)}", record.identity)
    if record.passages != len(item.rows):
        raise ValueError(
            f"{kvstore.url}{manifest.shard_folder(item.name)} holds {record.passages} passages, and "
            f"this job puts {len(item.rows)} there. Go on with the former shard size, or set INDEX_DIR "
            "to a new folder."
        )
    return record


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard is read, one encoded and one written at a time, each on its thread."""

    kvstore: ts.KvStore
    passages: Passages
    encoder: TextEncoder
    identity: Identity
    progress: Progress
    lock: WriterLock

    def run(self, todo: Sequence[Todo]) -> Iterator[tuple[str, Record]]:
        """Makes shards one by one; gives the name and record of each that is there for good."""
        threads = concurrent.futures.ThreadPoolExecutor
        with threads(1, "index-reader") as reader, threads(1, "index-writer") as writer:
            reading = [reader.submit(self._read, item.rows) for item in todo[:1]]
            writing: list[tuple[str, concurrent.futures.Future[Record]]] = []
            for item, following in itertools.zip_longest(todo, todo[1:]):
                tokens = reading.pop().result()
                if following is not None:
                    reading.append(reader.submit(self._read, following.rows))
                vectors = self._encode(item, tokens)
                # At most one shard waits to be written, so that RAM is bounded.
                for name, future in writing:
                    yield name, future.result()
                cut_off = self.encoder.cut(tokens)
                writing = [(item.name, writer.submit(self._write, item.name, vectors, cut_off))]
            for name, future in writing:
                yield name, future.result()

    def _read(self, rows: np.ndarray) -> list[list[int]]:
        records = self.passages.records(int(rows[0]), int(rows[-1]) + 1)
        return self.encoder.tokenize([passage_text(record) for record in records])

    def _encode(self, item: Todo, tokens: list[list[int]]) -> np.ndarray:
        def after_batch(passages: int, real: int, computed: int) -> None:
            self.progress.advance(passages)
            STOP.poll(
                f"Stopped before shard {item.name} of the index was complete; finished shards are "
                "kept. Run the same command again to resume."
            )

        vectors = self.encoder.encode(tokens, after_batch)
        bad = ~np.isfinite(vectors).all(axis=1)
        if bad.any():
            raise ValueError(
                "The encoder gave NaN or infinity for passage "
                f"{int(self.passages.ids[item.rows[bad][0]])}. Check its weights and its dtype."
            )
        return vectors.astype(index.DTYPE)

    def _write(self, name: str, vectors: np.ndarray, truncated: int) -> Record:
        """Vectors first, then the record that makes them count."""
        self.lock.check()
        here = folder.subfolder(self.kvstore, manifest.shard_folder(name))
        try:
            # What an earlier attempt may have left.
            here.delete_range(ts.KvStore.KeyRange()).result()
        except ValueError as error:
            raise storage_error(here.url, error) from error
        files = {}
        for key, data in shard.encode_array(vectors, index.CHUNK_ROWS).items():
            path = f"{index.VECTORS}/{key}"
            folder.write_file(here, path, data)
            files[path] = (len(data), hashlib.sha256(data).hexdigest())
        program = dataclasses.asdict(self.encoder.program)
        record = Record(self.identity, program, len(vectors), truncated, files)
        self.lock.check()
        folder.write_file(here, manifest.RECORD, record.to_bytes())
        return record
