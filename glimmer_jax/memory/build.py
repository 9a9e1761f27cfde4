"""Building a memory store: layers [0, M) over every passage, once.

The corpus is divided into shards of consecutive passages. A shard is encoded in RAM (`encoding`), written
by a second thread while the next one is encoded, and finished by its record; the manifest comes last. A
build that was stopped by SIGTERM, SIGKILL or a power cut resumes at the first shard without a record
(`build_plan`), and ends with the same bytes as an uninterrupted one.
"""

import concurrent.futures
import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from glimmer_jax import codecs
from glimmer_jax.memory import build_plan, codec_error, manifest, shard
from glimmer_jax.memory.build_plan import Builders, FinishedShards, PendingShard
from glimmer_jax.memory.encoding import MemoryEncoder, ShardContent, ShardEncoder, States
from glimmer_jax.memory.manifest import Layout, Manifest, Record, Shard
from glimmer_jax.memory.source import Passages
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """How a store is built; none of it changes the memory of a passage."""

    # Two shards are in RAM: one is encoded, one written, which takes about four times its arrays.
    layout: Layout = dataclasses.field(default_factory=Layout)
    accept_other_program: bool = False  # keep finished shards of another program; both are recorded
    builders: Builders = dataclasses.field(default_factory=Builders)


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of one run of a build."""

    manifest: Manifest | None  # None if another builder writes it
    built: int  # shards
    skipped: int  # shards that were already finished
    passages_per_s: float
    tokens_per_s: float
    fraction_of_peak: float  # tokens_per_s / matmul_bound; NaN if the bound is not known
    padding: float  # padding tokens / computed tokens
    seconds: float


def build_memory(
    encoder: MemoryEncoder,
    passages: Passages,
    path: folder.Path,
    *,
    passages_fingerprint: str,
    config: BuildConfig = BuildConfig(),
    reference: States | None = None,
    matmul_bound: float | None = None,
    name: str = "memory",
) -> Report:
    """Builds the memory store at `path`, or resumes the build. A finished store is not written to.

    Args:
      encoder: its encode step is compiled once for each length bucket.
      passages: the corpus; row i becomes row i of the store.
      path: a local folder, a TensorStore URL or spec; created if missing.
      passages_fingerprint: of `passages`, recorded; see `fingerprint.passages_fingerprint`.
      config: shards, and who builds which.
      reference: the encoder in float32, to measure the error of the stored arrays.
      matmul_bound: upper bound of tokens per second, see `estimate.matmul_rate`; for the log.
      name: of what is built, in the log.

    Raises:
      ValueError: passages or files at `path` do not fit, another writer is at work, or the encoder
        returned NaN or infinity (the passage is named).
      OSError: the storage failed; finished shards are kept.
      StopRequested: a stop was requested; finished shards are kept.
    """
    check_ids(passages.ids)
    builders = config.builders
    shards = build_plan.cut(np.arange(len(passages)), config.layout.shard_passages)
    kvstore = folder.open_folder(path)
    finished = FinishedShards(
        kvstore, passages, encoder, config.layout, config.accept_other_program
    )

    stored = build_plan.check_manifest(kvstore, encoder.identity, len(shards))
    if (
        stored is not None
        and folder.read_file(kvstore, manifest.LOCK) is None
        and passages_fingerprint in stored.passages_fingerprints
        and (reference is None or stored.codec_error is not None)
        and finished.is_complete(stored, shards)
    ):
        return Report(stored, 0, len(shards), **rates(encode_progress(0), matmul_bound))
    with builders.lock(kvstore, manifest.LOCK) as lock:
        build_plan.check_manifest(kvstore, encoder.identity, len(shards))
        plan = finished.plan(builders.own(shards))
        error = None
        if reference is not None and builders.index == 0:
            error = measure_error(encoder, reference, passages)
        progress = encode_progress(plan.remaining_passages(), matmul_bound, name)
        shard_encoder = ShardEncoder(encoder, passages, progress)
        built = dict(write_shards(kvstore, plan.pending, shard_encoder, config.layout, lock))
        progress.log()
        measured = rates(progress, matmul_bound)  # before waiting for other builders
        if builders.index != 0:
            return Report(None, len(plan.pending), len(plan.finished), **measured)
        records = {**plan.finished, **built}
        others = [item for item in shards if item.name not in records]
        records |= builders.wait_for_records(others, finished)
        new = Manifest.of(
            encoder.identity,
            [Shard.of(item.name, records[item.name]) for item in shards],
            version=1,
            passages_fingerprints=[passages_fingerprint],
            codec_error=error,
        )
        lock.check()
        folder.write_file(kvstore, manifest.MANIFEST, new.to_bytes())
    return Report(new, len(plan.pending), len(plan.finished), **measured)


def encode_progress(
    passages: int, matmul_bound: float | None = None, name: str = "memory"
) -> Progress:
    """Progress of encoding `passages`."""

    def details() -> str:
        measured = rates(progress, matmul_bound)
        fraction = measured["fraction_of_peak"]
        bound = "" if math.isnan(fraction) else f" ({fraction:.0%} of the matmul bound)"
        return (
            f"{measured['tokens_per_s']:.0f} tokens/s{bound}, {measured['padding']:.1%} padding, "
            f"{progress.totals['bytes'] / 1e6:.1f} MB written"
        )

    progress = Progress(name, passages, "passages", details=details)
    return progress


def rates(progress: Progress, matmul_bound: float | None) -> dict[str, float]:
    """The rates of `Report`."""
    totals = progress.totals
    tokens_per_s = totals["tokens"] / progress.seconds
    return {
        "passages_per_s": progress.rate,
        "tokens_per_s": tokens_per_s,
        "fraction_of_peak": tokens_per_s / matmul_bound if matmul_bound else math.nan,
        "padding": 1.0 - totals["tokens"] / totals["computed"] if totals["computed"] else 0.0,
        "seconds": progress.seconds,
    }


def check_ids(ids: np.ndarray) -> None:
    """Raises ValueError for duplicate or negative ids."""
    unique, counts = np.unique(np.asarray(ids), return_counts=True)
    if (counts > 1).any() or (unique < 0).any():
        raise ValueError(
            "Passage ids must be unique and not negative; got "
            f"{unique[(counts > 1) | (unique < 0)][:10].tolist()}."
        )


def measure_error(
    encoder: MemoryEncoder, reference: States, passages: Passages, sample: int = 128
) -> dict[str, float] | None:
    """Error of the stored arrays against `reference`, on a sample of passages."""
    codec = codecs.get(encoder.identity.codec)
    error = codec_error.measure(
        encoder.encode,
        reference,
        passages,
        lambda arrays: codec.decode(arrays, np.float32, encoder.codebooks),
        rows=encoder.program.rows,
        buckets=encoder.program.buckets,
        devices=encoder.devices,
        sample=sample,
    )
    logger.info("error of codec %s against float32: %s", codec.name, error)
    return error


def write_shards(
    kvstore: ts.KvStore,
    pending: Iterable[PendingShard],
    encoder: ShardEncoder,
    layout: Layout,
    lock: WriterLock,
) -> Iterator[tuple[str, Record]]:
    """Builds shards one by one; yields name and record of each after it has been written.

    Raises ValueError if the lock is lost, before anything more is written.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "memory-writer") as writer:
        # At most one shard waits to be written, which bounds RAM.
        name, writing = "", None
        for content in encoder.compute((item.name, item.rows) for item in pending):
            if writing is not None:
                yield name, _finish(writing, encoder)
            name = content.name
            writing = writer.submit(write_shard, kvstore, content, encoder.encoder, layout, lock)
        if writing is not None:
            yield name, _finish(writing, encoder)


def _finish(writing: concurrent.futures.Future[Record], encoder: ShardEncoder) -> Record:
    record = writing.result()
    encoder.progress.advance(0, bytes=record.bytes)
    return record


def write_shard(
    kvstore: ts.KvStore,
    content: ShardContent,
    encoder: MemoryEncoder,
    layout: Layout,
    lock: WriterLock | None,
) -> Record:
    """Writes the arrays, then the record, which makes the shard a finished one."""
    if lock is not None:
        lock.check()
    here = folder.subfolder(kvstore, manifest.shard_folder(content.name))
    source = content.source
    files, seals = shard.write_arrays(
        here, content.arrays, source, content.offsets, chunk_tokens=layout.chunk_tokens
    )
    record = Record(
        identity=encoder.identity,
        program=encoder.program,
        layout=layout,
        passages=len(source.ids),
        tokens=int(content.offsets[-1]),
        truncated=source.truncated,
        longest=int(np.diff(content.offsets).max(initial=0)),
        source_sha256=source.sha256,
        files=files,
        seals=seals,
    )
    if lock is not None:
        lock.check()
    folder.write_file(here, manifest.RECORD, record.to_bytes())
    return record
