"""Corpus files to passages, line after line in one process; `beam` does the same in many."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glimmer_jax.corpus import formats, lines
from glimmer_jax.corpus.files import Span
from glimmer_jax.corpus.parquet import read_rows
from glimmer_jax.corpus.progress import Progress
from glimmer_jax.corpus.report import Problem, Report
from glimmer_jax.corpus.seen import Seen
from glimmer_jax.kilt.examples import Policy


@dataclasses.dataclass(frozen=True)
class Reading:
    """How corpus files are read.

    Attributes:
      format: one of `formats.FORMATS`.
      words: most words of a passage; None leaves passages as they are, pages need a number.
      policy: what to do with bad lines, of the same id as an earlier one too.
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
            raise ValueError(f"PASSAGE_WORDS must be 2 or more, got {self.words}.")
        if self.format == "kilt" and self.words is None:
            raise ValueError("Pages must be cut: set PASSAGE_WORDS, for instance to 100 or 200.")


def read_passages(
    paths: Sequence[str], reading: Reading = Reading(), report: Report | None = None
) -> Iterator[dict[str, Any]]:
    """Passages `{"id", "title", "text", …}` of corpus files, in order.

    Args:
      paths: files of one format, see `files.find_files`.
      reading: how.
      report: is filled as the passages are taken.

    Raises:
      ValueError: naming file, line and byte, where a line is at fault and may not be skipped; or a
        file is.
    """
    report = Report() if report is None else report
    seen, progress = Seen(), Progress(paths, report)

    def is_repeated(number: int, key: int) -> bool:
        return not seen.add(key)

    for path in paths:
        yield from span_passages(Span(path), reading, report, is_repeated, progress.read)
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
      span: what to read.
      reading: how.
      report: is filled.
      is_repeated: of line number and key, whether the document was given before.
      on_read: is called with numbers of bytes.

    Raises ValueError where the file as a whole cannot be read.
    """
    for number, offset, found in _documents(span, reading.format, on_read):
        report.lines += 1
        if found is None:
            continue
        if isinstance(found, formats.Document):
            if not is_repeated(number, found.key):
                made = formats.passages(reading.format, found.record, reading.words)
                report.documents += 1
                report.passages += len(made)
                report.empty += not made
                report.split += len(made) > 1 and reading.format != "kilt"
                yield from made
                continue
            found = f"{found.name} was given before. Leave one of them out."
        report.add(Problem(span.path, number, offset, found), reading.policy)
        if report.stopped:
            return


def _documents(
    span: Span, format: str, on_read: Callable[[int], None]
) -> Iterator[tuple[int, int | None, formats.Document | str | None]]:
    """(line, byte, document or what is wrong or None) of every line."""
    if format == "parquet":
        for number, record in read_rows(span.path, on_read):
            yield number, None, _or_problem(formats.document, record)
        return
    for line in lines.read_lines(span, on_read):
        if line.data is None:
            problem = f"the line is longer than {lines.MAX_LINE} bytes. Break the page up."
            yield line.number, line.offset, problem
        else:
            yield line.number, line.offset, _or_problem(formats.parse, format, line.data)


def _or_problem(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)
