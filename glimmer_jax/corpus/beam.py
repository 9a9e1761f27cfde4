"""Corpus files to passages in many processes: an Apache Beam pipeline over spans of the files.

    corpus-00000-of-00560.jsonl …    passages of one span each; together those of a single process

`reading.span_passages` reads a span, as in a single process, and each span becomes one shard. Two steps
need all spans. Repeated ids are found by grouping, and the spans with repetitions are read again without
them. Counts and problems are merged after the pipeline. Shards are renamed at the end, once everything
succeeded. `request.json` lies beside them: with it a command that was stopped later keeps its shards.

    python -m pip install 'glimmer-jax[beam]'
"""

import dataclasses
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from glimmer_jax.corpus.files import make_spans
from glimmer_jax.corpus.reading import Reading, span_passages
from glimmer_jax.corpus.report import Report, merge
from glimmer_jax.storage.folder import dump_json, of_file, read_file, write_file
from glimmer_jax.storage.json_lines import dump_line, parse_line
from glimmer_jax.storage.lines import Span

# Index of the span, and number of the line in it.
Place = tuple[int, int]
_WORKING, _REQUEST = "unfinished", "request.json"


def write_passages(
    paths: Sequence[str],
    folder: str,
    reading: Reading,
    options: Sequence[str] = (),
    *,
    span_bytes: int | None = None,
    overwrite: bool = False,
) -> tuple[list[str], Report]:
    """Writes the passages of corpus files as shards of JSON Lines; returns their paths and the report.

    The shards of an earlier call for the same files, sizes and times are kept, or completed.

    Args:
      paths: files of one format, see `files.find_files`.
      folder: where shards are written; remote workers must be able to reach it.
      reading: format, length limit and policy.
      options: Beam's own flags, such as `--runner=DataflowRunner`.
      span_bytes: bytes of a file per shard; None for 64 MiB.
      overwrite: replace existing shards.

    Raises:
      ValueError: Beam is missing, shards of other files exist, or as `reading.read_passages`. The folder
        is left unchanged.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ValueError(
            "BEAM_OPTIONS needs Apache Beam: pip install 'glimmer-jax[beam]'. Without BEAM_OPTIONS a "
            "single process reads the corpus."
        ) from None
    target = epath.Path(folder)
    working = target / _WORKING
    old = list(target.glob("corpus-*-of-*.jsonl"))
    spans = list(make_spans(paths) if span_bytes is None else make_spans(paths, span_bytes))
    shards = [target / f"corpus-{i:05d}-of-{len(spans):05d}.jsonl" for i in range(len(spans))]
    stats = [epath.Path(path).stat() for path in paths]
    request: dict[str, Any] = {
        "files": [[path, x.length, x.mtime] for path, x in zip(paths, stats, strict=True)],
        "spans": len(spans),
        "reading": dataclasses.asdict(reading),
    }
    written = _read_request(folder)
    if written.get("request") == request and not overwrite:
        if not working.exists() and all(path.exists() for path in shards):
            return [str(path) for path in shards], Report.from_json(written["report"])
    elif old and not overwrite:
        raise ValueError(
            f"CORPUS_DIR: {folder} holds a corpus already. Read it with CORPUS='{folder}/*.jsonl', write "
            "elsewhere, or set OVERWRITE=True."
        )
    if working.exists():
        working.rmtree()
    # Workers of an attempt that was killed may still run, and write into its folder.
    attempt = working / uuid.uuid4().hex
    attempt.mkdir(parents=True)
    try:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            places = (
                pipeline
                | "spans" >> beam.Create(range(len(spans)))
                | beam.Reshuffle()
                | "read" >> beam.FlatMap(_write_span, spans, str(attempt), reading)
            )
            repeated = places | "by id" >> beam.GroupByKey() | beam.FlatMap(_all_but_first)
            _ = (
                repeated
                | "by span" >> beam.GroupByKey()
                | "reread" >> beam.Map(_rewrite_span, spans, str(attempt), reading)
            )
        reports = [Report.from_json(_report(attempt, i).read_text()) for i in range(len(spans))]
        report = merge(zip(spans, reports, strict=True))
        report.check(reading.policy)
        note = {"request": request, "report": report.to_json()}
        write_file(*of_file(f"{folder}/{_REQUEST}"), dump_json(note))
        for path in old:
            path.unlink()
        for index, path in enumerate(shards):
            _shard(attempt, index).rename(path)
    finally:
        working.rmtree()
    return [str(path) for path in shards], report


def _read_request(folder: str) -> dict[str, Any]:
    """The request and the report of the shards in a folder; empty where they are not known."""
    data = read_file(*of_file(f"{folder}/{_REQUEST}"))
    try:
        return {} if data is None else parse_line(data, folder)
    except ValueError:
        return {}


def _shard(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"{index:05d}.jsonl"


def _report(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"{index:05d}.json"


def _write_span(
    index: int, spans: Sequence[Span], folder: str, reading: Reading, repeated: Collection[int] = ()
) -> Iterator[tuple[int, Place]]:
    """Writes the shard and the report of a span; yields key and place of each document."""
    report = Report()
    places: list[tuple[int, Place]] = []

    def is_repeated(number: int, key: int) -> bool:
        places.append((key, (index, number)))
        return number in repeated

    with _shard(epath.Path(folder), index).open("wb") as file:
        passages = span_passages(spans[index], reading, report, is_repeated, lambda count: None)
        try:
            for record in passages:
                file.write(dump_line(record).encode("utf-8"))
                yield from places
                places.clear()
        except ValueError as error:
            report.failure = str(error)
    yield from places
    _report(epath.Path(folder), index).write_text(report.to_json())


def _all_but_first(places: tuple[int, Iterable[Place]]) -> Iterator[Place]:
    yield from sorted(places[1])[1:]


def _rewrite_span(
    repeated: tuple[int, Iterable[int]], spans: Sequence[Span], folder: str, reading: Reading
) -> None:
    index, numbers = repeated
    for _ in _write_span(index, spans, folder, reading, frozenset(numbers)):
        pass
