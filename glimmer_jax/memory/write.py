"""Shards from passages to storage: one is computed while the one before it is written."""

import concurrent.futures
from collections.abc import Iterable, Iterator

import tensorstore as ts

from glimmer_jax import folder
from glimmer_jax.lock import WriterLock
from glimmer_jax.memory import manifest, shard
from glimmer_jax.memory.compute import Content, Job
from glimmer_jax.memory.identity import Layout
from glimmer_jax.memory.manifest import Record
from glimmer_jax.memory.resume import Todo


def write_shards(
    kvstore: ts.KvStore, todo: Iterable[Todo], job: Job, layout: Layout, lock: WriterLock
) -> Iterator[tuple[str, Record]]:
    """Builds shards one by one; gives the name and record of each when it is there for good.

    Raises ValueError before it writes anything more where the lock is lost.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "memory-writer") as writer:
        # At most one shard waits to be written, so that RAM is bounded.
        name, writing = "", None
        for content in job.compute((item.name, item.rows) for item in todo):
            if writing is not None:
                yield name, _finish(writing, job)
            name = content.name
            writing = writer.submit(write, kvstore, content, job, layout, lock)
        if writing is not None:
            yield name, _finish(writing, job)


def _finish(writing: concurrent.futures.Future[Record], job: Job) -> Record:
    record = writing.result()
    job.progress.wrote(record.bytes)
    return record


def write(
    kvstore: ts.KvStore, content: Content, job: Job, layout: Layout, lock: WriterLock | None
) -> Record:
    """Arrays first, then the record that makes them count."""
    if lock is not None:
        lock.check()
    here = folder.subfolder(kvstore, manifest.shard_folder(content.name))
    source = content.source
    files = shard.write_arrays(
        here, content.arrays, source, content.offsets, chunk_tokens=layout.chunk_tokens
    )
    record = Record(
        identity=job.recipe.identity,
        program=job.recipe.program,
        layout=layout,
        passages=len(source.ids),
        tokens=int(content.offsets[-1]),
        truncated=source.truncated,
        longest=int(source.lengths.max(initial=0)),
        source_sha256=source.sha256,
        files=files,
    )
    if lock is not None:
        lock.check()
    folder.write_file(here, manifest.RECORD, record.to_bytes())
    return record
