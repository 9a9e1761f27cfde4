"""Corpus files to passages, line by line in one process; `beam` does the same in many."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glimmer_jax.corpus import formats
from glimmer_jax.corpus.report import Policy, Problem, Report
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage import lines
from glimmer_jax.storage.lines import Span, file_size


@dataclasses.dataclass(frozen=True)
class Reading:
    """How corpus files are read.

    Attributes:
      format: one of `formats.FORMATS`.
      words: most words per passage; None keeps passages as they are, pages require a number.
      policy: what to do with invalid lines and repeated ids.
    """

    format: str = "passages"
    words: int | None = None
    policy: Policy = dataclasses.field(default_factory=Policy)

    def __post_init__(self) -> None:
        if self.format not in formats.FORMATS:
            raise ValueError(
                f"CORPUS_FORMAT must be one of {formats.FORMATS}, got {self.format!r}."
            )
        if self.words is not None and self.words < 2:
            raise ValueError(f"PASSAGE_WORDS must be at least 2, got {self.words}.")
        if self.format == "kilt" and self.words is None:
            raise ValueError(
                "PASSAGE_WORDS must be set to cut pages, for example to 100 or 200; got None."
            )


def read_passages(
    paths: Sequence[str], reading: Reading = Reading(), report: Report | None = None
) -> Iterator[dict[str, Any]]:
    """Passages `{"id", "title", "text", …}` of corpus files, in order.

    Keys of all documents are held in a set, about 80 bytes each: 2 GB for DPR's 21 million passages.

    Args:
      paths: files of one format, see `files.find_files`.
      reading: format, length limit and policy.
      report: updated as passages are read.

    Raises:
      ValueError: an invalid line that may not be skipped, with file, line and byte; or an unreadable
        file.
    """
    report = Report() if report is None else report
    keys: set[int] = set()
    progress = Progress(
        "corpus",
        sum(file_size(path) for path in paths),
        "bytes",
        details=lambda: (
            f"{report.documents} documents, {report.passages} passages, {report.skipped} bad lines"
        ),
    )

    def on_read(count: int) -> None:
        progress.advance(count)
        STOP.poll("Stopped reading the corpus. Run the same command again.")

    def is_repeated(number: int, key: int) -> bool:
        size = len(keys)
        keys.add(key)
        return len(keys) == size

    for path in paths:
        yield from span_passages(Span(path), reading, report, is_repeated, on_read)
        report.check(reading.policy)


def span_passages(
    span: Span,
    reading: Reading,
    report: Report,
    is_repeated: Callable[[int, int], bool],
    on_read: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Passages of the lines of a span, up to the first problem that the policy does not allow.

    Args:
      span: part of a file.
      reading: format, length limit and policy.
      report: updated as passages are read.
      is_repeated: takes line number and key; whether the document occurred before.
      on_read: called with the number of bytes at each read.

    Raises ValueError where the file cannot be read.
    """
    for number, offset, item in _documents(span, reading.format, on_read):
        report.lines += 1
        if item is None:
            continue
        if isinstance(item, formats.Document):
            if not is_repeated(number, item.key):
                passages = formats.passages(reading.format, item.record, reading.words)
                report.documents += 1
                report.passages += len(passages)
                report.empty += not passages
                report.split += len(passages) > 1 and reading.format != "kilt"
                yield from passages
                continue
            item = f"{item.name} occurs more than once. Keep one."
        report.add(Problem(span.path, number, offset, item), reading.policy)
        if report.stopped:
            return


def _documents(
    span: Span, format: str, on_read: Callable[[int], None]
) -> Iterator[tuple[int, int | None, formats.Document | str | None]]:
    """(line, byte, document or error message or None) of each line."""
    if format == "parquet":
        for number, record in formats.read_parquet(span.path, on_read):
            yield number, None, _or_message(formats.document, record)
        return
    for line in lines.read_lines(span, on_read):
        if line.data is None:
            message = f"the line is longer than {lines.MAX_LINE} bytes. Break the page up."
            yield line.number, line.offset, message
        else:
            yield line.number, line.offset, _or_message(formats.parse, format, line.data)


def _or_message(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)
