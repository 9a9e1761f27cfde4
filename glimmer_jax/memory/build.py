"""The job that computes memory: layers [0, M) over every passage, once.

The corpus is cut into shards of consecutive passages. Each shard is encoded in batches of similar
length (`batches`), put in place in RAM, written by a second thread while the next one is computed,
and finished by its record. A build that was stopped, by SIGTERM, kill -9 or a power cut, goes on
with the first shard that has no record, and ends with the same bytes as one that was not.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory import batches, error, folder, manifest, resume, shard
from glimmer_jax.memory.compute import Content, Encode, Job, Passages
from glimmer_jax.memory.lock import BuildLock
from glimmer_jax.memory.manifest import Identity, Manifest, Program, Record
from glimmer_jax.memory.progress import Progress
from glimmer_jax.preemption import Watcher

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one run of the job did."""

    manifest: Manifest
    built: int  # shards
    skipped: int  # shards that were there already
    passages_per_s: float
    tokens_per_s: float
    padding: float  # part of the computed tokens that was padding
    seconds: float


def build_memory(
    encode: Encode,
    passages: Passages,
    path: folder.Path,
    *,
    codec: str,
    emb_dim: int,
    encoder_fingerprint: str,
    vocabulary_fingerprint: str,
    max_length: int,
    batch_size: int = 32,
    buckets: Sequence[int] | None = None,
    devices: int = 1,
    dtype: str = "float32",
    shard_passages: int = 1024,
    chunk_tokens: int = 64,
    reference: Encode | None = None,
    error_sample: int = 128,
    accept_other_program: bool = False,
    watcher: Watcher | None = None,
    on_progress: Callable[[Mapping[str, float]], None] | None = None,
    progress_seconds: float = 10.0,
) -> Report:
    """Builds the memory store at `path`, or goes on with it.

    Args:
      encode: int32 tokens `[devices * batch_size, P]` -> the codec's arrays `[..., P, *trailing]`;
        compiled once for each bucket. See `compute.bind_encoder`.
      passages: the corpus; row i becomes row i of the store.
      path: a local folder, a TensorStore URL or spec; created if missing.
      codec: name of the codec whose arrays `encode` returns.
      emb_dim: D.
      encoder_fingerprint, vocabulary_fingerprint: recorded, and compared by every reader.
      max_length: tokens of the longest passage to keep; longer ones are cut and counted.
      batch_size: passages a device encodes at once.
      buckets: lengths to compile for; default multiples of 32. The last is max_length.
      devices: devices that `encode` spreads its batch over.
      dtype: of the encoder's activations, recorded in the program.
      shard_passages: passages a shard; about two shards are in RAM at a time.
      chunk_tokens: tokens of the smallest unit of reading.
      reference: the encoder in float32, to measure the error of what is stored.
      accept_other_program: keep finished shards that another program made, and record both.
      watcher: where a request to stop is noticed; default: SIGTERM, if in the main thread.
      on_progress: called with numbers for a metrics writer, about every `progress_seconds`.

    Raises:
      ValueError: settings, passages or what is already at `path` do not fit, another writer is at
        work, or the encoder gave NaN or infinity (the passage is named).
      Preempted: asked to stop; finished shards are kept.
    """
    buckets = tuple(buckets or batches.default_buckets(max_length))
    program = Program(batch_size, buckets, dtype, jax.default_backend(), jax.__version__)
    _check_settings(passages, buckets, max_length, shard_passages, chunk_tokens, devices)
    identity = Identity(
        encoder_fingerprint=encoder_fingerprint,
        vocabulary_fingerprint=vocabulary_fingerprint,
        codec=codec,
        emb_dim=emb_dim,
        max_length=max_length,
        shard_passages=shard_passages,
        chunk_tokens=chunk_tokens,
    )
    kvstore = folder.open_folder(path)
    with BuildLock(kvstore), watcher or Watcher() as watcher:
        plan = resume.plan(kvstore, passages, identity, program, accept_other_program)
        codec_error = None
        if reference is not None:
            codec_error = error.measure(
                encode,
                reference,
                passages,
                codecs.get(codec),
                rows=batch_size,
                buckets=buckets,
                devices=devices,
                sample=error_sample,
            )
            logger.info("error of codec %s against float32: %s", codec, codec_error)
        progress = Progress(plan.remaining_passages(), on_progress, progress_seconds)
        job = Job(encode, passages, identity, program, devices, watcher, progress)
        records = dict(plan.finished)
        with concurrent.futures.ThreadPoolExecutor(1, "memory-writer") as writer:
            writing: concurrent.futures.Future[Record] | None = None
            for todo in plan.todo:
                content = job.compute(todo)
                # At most one shard waits to be written, so that RAM is bounded.
                if writing is not None:
                    _keep(writing.result(), records, progress)
                writing = writer.submit(_write, kvstore, todo.name, content, job)
            if writing is not None:
                _keep(writing.result(), records, progress)
        found = _manifest(identity, records, codec_error)
        folder.write_file(kvstore, manifest.MANIFEST, found.to_bytes())
        rates = progress.finish()
    return Report(found, len(plan.todo), len(plan.finished), **rates)


def _check_settings(passages, buckets, max_length, shard_passages, chunk_tokens, devices) -> None:
    if buckets[-1] != max_length:
        raise ValueError(
            f"The last length bucket must be max_length={max_length}; got buckets {buckets}."
        )
    if min(shard_passages, chunk_tokens, devices) < 1:
        raise ValueError(
            "shard_passages, chunk_tokens and devices must be at least 1; got "
            f"{shard_passages}, {chunk_tokens}, {devices}."
        )
    ids = np.asarray(passages.ids)
    unique, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any() or (unique < 0).any():
        raise ValueError(
            "Passage ids must be unique and not negative; look at "
            f"{unique[(counts > 1) | (unique < 0)][:10].tolist()}."
        )


def _write(kvstore, name: str, content: Content, job: Job) -> Record:
    """Arrays first, then the record that makes them count."""
    here = folder.subfolder(kvstore, manifest.shard_folder(name))
    files = shard.write_arrays(
        here,
        content.arrays,
        ids=job.passages.ids[content.rows],
        offsets=content.offsets,
        titles=content.titles,
        chunk_tokens=job.identity.chunk_tokens,
    )
    record = Record(
        identity=job.identity,
        program=job.program,
        first_row=int(content.rows[0]),
        passages=len(content.rows),
        tokens=int(content.offsets[-1]),
        truncated=content.truncated,
        longest=int(np.diff(content.offsets).max()),
        source_sha256=content.source_sha256,
        files=files,
    )
    folder.write_file(here, manifest.RECORD, record.to_bytes())
    return record


def _keep(record: Record, records: dict[int, Record], progress: Progress) -> None:
    records[record.first_row] = record
    progress.wrote(sum(size for size, _ in record.files.values()))


def _manifest(identity: Identity, records: Mapping[int, Record], codec_error) -> Manifest:
    in_order = [records[row] for row in sorted(records)]
    programs = tuple(dict.fromkeys(record.program for record in in_order))
    shards = tuple(
        manifest.Shard(
            name=resume.shard_name(index),
            first_row=record.first_row,
            passages=record.passages,
            tokens=record.tokens,
            bytes=sum(size for size, _ in record.files.values()),
            program=programs.index(record.program),
            record_sha256=hashlib.sha256(record.to_bytes()).hexdigest(),
        )
        for index, record in enumerate(in_order)
    )
    return Manifest(
        identity=identity,
        num_passages=sum(record.passages for record in in_order),
        num_tokens=sum(record.tokens for record in in_order),
        num_bytes=sum(entry.bytes for entry in shards),
        truncated=sum(record.truncated for record in in_order),
        longest=max((record.longest for record in in_order), default=0),
        programs=programs,
        codec_error=codec_error,
        shards=shards,
    )
