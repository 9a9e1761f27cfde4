"""The job that computes memory: layers [0, M) over every passage, once.

The corpus is cut into shards of consecutive passages. Each shard is encoded in batches of similar
length (`batches`), put in place in RAM, written by a second thread while the next one is computed,
and finished by its record. A build that was stopped, by SIGTERM, kill -9 or a power cut, goes on
with the first shard that has no record, and ends with the same bytes as one that was not.

Shards from passages to storage: one is computed while the one before it is written.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from glimmer_jax import codecs
from glimmer_jax.memory import build_plan, codec_error, manifest, shard
from glimmer_jax.memory.build_plan import Builders, Todo, wait_for_records
from glimmer_jax.memory.encoding import Content, Job, Recipe, States
from glimmer_jax.memory.manifest import Layout, Manifest, Record, Shard
from glimmer_jax.memory.shard import Passages
from glimmer_jax.runtime.prefetch import ReadAhead
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one run of the job did."""

    manifest: Manifest | None  # None where another builder writes it
    built: int  # shards
    skipped: int  # shards that were there already
    passages_per_s: float
    tokens_per_s: float
    of_floor: float  # tokens_per_s of what matrix products alone would allow; NaN if not known
    padding: float  # part of the computed tokens that was padding
    seconds: float


def build_memory(
    recipe: Recipe,
    passages: Passages,
    path: folder.Path,
    *,
    passages_fingerprint: str,
    layout: Layout = Layout(shard_passages=1024, chunk_tokens=64),
    reference: States | None = None,
    accept_other_program: bool = False,
    builders: Builders = Builders(),
    floor: float | None = None,
) -> Report:
    """Builds the memory store at `path`, or goes on with it.

    Args:
      recipe: how to encode; its encode step is compiled once for each length bucket.
      passages: the corpus; row i becomes row i of the store.
      path: a local folder, a TensorStore URL or spec; created if missing.
      passages_fingerprint: of `passages`, recorded; see `fingerprint.passages_fingerprint`.
      layout: two shards are in RAM at a time, the one that is written some four times.
      reference: the encoder in float32, to measure the error of what is stored.
      accept_other_program: keep finished shards that another program made, and record both.
      builders: who this is, where several build one store at a time.
      floor: tokens a second to hold the progress against, see `floor.matrix_rate`.

    Raises:
      ValueError: passages or what is already at `path` do not fit, another writer is at work, or
        the encoder gave NaN or infinity (the passage is named).
      OSError: the storage failed; finished shards are kept.
      StopRequested: asked to stop; finished shards are kept.
    """
    check_ids(passages.ids)
    shards = build_plan.cut(np.arange(len(passages)), layout.shard_passages)
    kvstore = folder.open_folder(path)
    mine = builders.own(shards)
    with builders.lock(kvstore, manifest.LOCK) as lock:
        build_plan.check_manifest(kvstore, recipe.identity, len(shards))
        plan = build_plan.plan(kvstore, passages, mine, recipe, layout, accept_other_program)
        first, lost = builders.index == 0, None
        if reference is not None and first:
            lost = measure_error(recipe, reference, passages)
        progress = make_progress(plan.remaining_passages(), floor)
        job = Job(recipe, passages, progress)
        records = {**plan.finished, **dict(write_shards(kvstore, plan.todo, job, layout, lock))}
        progress.log()
        rates = measured_rates(progress, floor)  # before others are waited for
        found = None
        if first:
            others = [item for item in shards if item.name not in records]

            def read(item: build_plan.Todo) -> Record | None:
                return build_plan.read_whole(
                    kvstore, item, passages, recipe, layout, accept_other_program
                )

            records |= wait_for_records(others, read, builders)
            found = Manifest.of(
                recipe.identity,
                [Shard.of(item.name, records[item.name]) for item in shards],
                version=1,
                passages_fingerprints=[passages_fingerprint],
                codec_error=lost,
            )
            lock.check()
            folder.write_file(kvstore, manifest.MANIFEST, found.to_bytes())
    return Report(found, len(plan.todo), len(plan.finished), **rates)


def make_progress(passages: int, upper_bound: float | None = None) -> Progress:
    """Progress of encoding, in passages.

    Args:
      passages: to encode.
      upper_bound: tokens per second that matrix products alone would allow, where that is known.
    """

    def details() -> str:
        rates = measured_rates(progress, upper_bound)
        bound = "" if math.isnan(rates["of_floor"]) else f" ({rates['of_floor']:.0%} of the bound)"
        return (
            f"{rates['tokens_per_s']:.0f} tokens/s{bound}, {rates['padding']:.1%} padding, "
            f"{progress.totals['bytes'] / 1e6:.1f} MB written"
        )

    progress = Progress("memory", passages, "passages", details=details)
    return progress


def measured_rates(progress: Progress, upper_bound: float | None) -> dict[str, float]:
    """The rates of `Report`."""
    totals = progress.totals
    tokens_per_s = totals["tokens"] / progress.seconds
    return {
        "passages_per_s": progress.rate,
        "tokens_per_s": tokens_per_s,
        "of_floor": tokens_per_s / upper_bound if upper_bound else math.nan,
        "padding": 1.0 - totals["tokens"] / totals["computed"] if totals["computed"] else 0.0,
        "seconds": progress.seconds,
    }


def measure_error(
    recipe: Recipe, reference: States, passages: Passages, sample: int = 128
) -> dict[str, float] | None:
    """What the recipe's codec and numerics lose against `reference`, on a sample."""
    codec = codecs.get(recipe.identity.codec)
    lost = codec_error.measure(
        recipe.encode,
        reference,
        passages,
        lambda arrays: codec.decode(arrays, np.float32, recipe.codebooks),
        rows=recipe.program.rows,
        buckets=recipe.program.buckets,
        devices=recipe.devices,
        sample=sample,
    )
    logger.info("error of codec %s against float32: %s", codec.name, lost)
    return lost


def check_ids(ids: np.ndarray) -> None:
    """Raises ValueError for ids that are given twice or negative."""
    unique, counts = np.unique(np.asarray(ids), return_counts=True)
    if (counts > 1).any() or (unique < 0).any():
        raise ValueError(
            "Passage ids must be unique and not negative; look at "
            f"{unique[(counts > 1) | (unique < 0)][:10].tolist()}."
        )


def write_shards(
    kvstore: ts.KvStore, todo: Iterable[Todo], job: Job, layout: Layout, lock: WriterLock
) -> Iterator[tuple[str, Record]]:
    """Builds shards one by one; gives the name and record of each when it is there for good.

    Raises ValueError before it writes anything more where the lock is lost.
    """

    def write_one(content: Content) -> tuple[str, Record]:
        record = write(kvstore, content, job, layout, lock)
        job.progress.advance(0, bytes=record.bytes)
        return content.name, record

    # One shard is written on a thread while the next is computed; two are in RAM.
    return ReadAhead(write_one)(job.compute((item.name, item.rows) for item in todo))


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
