"""Counts and problems from reading a file, a span or a corpus."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from glimmer_jax.storage.lines import Span

NAMED = 5
ON_ERROR = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How invalid lines are treated.

    Attributes:
      on_error: "raise" raises at the first one, with file and line; "skip" drops and counts them.
      max_skipped: with "skip", more invalid lines than this raise.
    """

    on_error: str = "raise"
    max_skipped: int = 100

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"ON_ERROR must be one of {ON_ERROR}, got {self.on_error!r}.")
        if self.max_skipped < 0:
            raise ValueError(f"MAX_SKIPPED must be at least 0, got {self.max_skipped}.")


@dataclasses.dataclass(frozen=True)
class Problem:
    """An invalid line; `offset` is the byte where it begins, if known."""

    path: str
    number: int
    offset: int | None
    text: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f"byte {self.offset}: "
        return f"{self.path}:{self.number}: {place}{self.text}"


@dataclasses.dataclass
class Report:
    """Counts and the first problems.

    Attributes:
      lines: lines or rows read.
      documents: pages or records among them.
      passages: passages of those documents.
      empty: documents without text, and so without passages.
      split: records above the word limit, cut into several passages.
      skipped: invalid lines.
      named: the first `NAMED` of the invalid lines.
      stopped: reading ended early because no more lines may be skipped.
      failure: the error that ended the reading of a file.
    """

    lines: int = 0
    documents: int = 0
    passages: int = 0
    empty: int = 0
    split: int = 0
    skipped: int = 0
    named: list[Problem] = dataclasses.field(default_factory=list)
    stopped: bool = False
    failure: str | None = None

    def add(self, problem: Problem, policy: Policy) -> None:
        """Counts a problem, and sets `stopped` where the policy allows no more."""
        self.skipped += 1
        if len(self.named) < NAMED:
            self.named.append(problem)
        self.stopped = policy.on_error == "raise" or self.skipped > policy.max_skipped

    def check(self, policy: Policy) -> None:
        """Raises ValueError for more problems than the policy allows."""
        if self.skipped and policy.on_error == "raise":
            raise ValueError(str(self.named[0]))
        if self.skipped > policy.max_skipped:
            first = " ".join(str(problem) for problem in self.named)
            raise ValueError(
                f"CORPUS: more than MAX_SKIPPED={policy.max_skipped} invalid lines. The first: {first} "
                "Correct the file, or raise MAX_SKIPPED."
            )
        if self.failure is not None:
            raise ValueError(self.failure)

    def summary(self) -> str:
        """One line of counts, and one per named problem."""
        kinds = [(self.empty, "without text dropped"), (self.split, "longer ones cut")]
        kinds.append((self.skipped, "invalid lines skipped"))
        details = "".join(f", {count} {kind}" for count, kind in kinds if count)
        lines = [
            f"{self.lines} lines, {self.documents} documents, {self.passages} passages{details}."
        ]
        lines += [f"  {problem}" for problem in self.named]
        if self.skipped > len(self.named):
            lines.append(f"  and {self.skipped - len(self.named)} more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "named": [Problem(**problem) for problem in fields["named"]]})


def merge(parts: Iterable[tuple[Span, Report]]) -> Report:
    """One report of spans in order, with line numbers of the files.

    After a span that stopped early, lines have no known number and problems are only counted.
    """
    total = Report()
    path, before = "", 0
    for span, part in parts:
        if span.path != path:
            path, before = span.path, 0
        for name in ("lines", "documents", "passages", "empty", "split", "skipped"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        if not total.stopped and total.failure is None:
            moved = [dataclasses.replace(p, number=p.number + before) for p in part.named]
            total.named = (total.named + moved)[:NAMED]
            total.failure = part.failure
        total.stopped = total.stopped or part.stopped
        before += part.lines
    return total
