"""What was read, what came of it and what was wrong, of a file, a span or a whole corpus."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from glimmer_jax.kilt.examples import Policy
from glimmer_jax.storage.lines import Span

NAMED = 5


@dataclasses.dataclass(frozen=True)
class Problem:
    """A line at fault; `offset` is the byte where it begins, where that is known."""

    path: str
    number: int
    offset: int | None
    text: str

    def __str__(self) -> str:
        place = "" if self.offset is None else f"byte {self.offset}: "
        return f"{self.path}:{self.number}: {place}{self.text}"


@dataclasses.dataclass
class Report:
    """Counts, and the first problems.

    Attributes:
      lines: lines read, or rows.
      documents: pages or records among them.
      passages: what came of them.
      empty: documents without any text, which give no passage.
      split: records longer than the word limit, which give several.
      skipped: lines at fault.
      named: the first `NAMED` of those.
      stopped: whether reading ended early because no more may be skipped.
      failure: what kept a file from being read on.
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
        """Counts a problem; `stopped` is set where the policy allows it no more."""
        self.skipped += 1
        if len(self.named) < NAMED:
            self.named.append(problem)
        self.stopped = policy.on_error == "raise" or self.skipped > policy.max_skipped

    def check(self, policy: Policy) -> None:
        """Raises ValueError where there is more at fault than the policy allows."""
        if self.skipped and policy.on_error == "raise":
            raise ValueError(str(self.named[0]))
        if self.skipped > policy.max_skipped:
            first = " ".join(str(problem) for problem in self.named)
            raise ValueError(
                f"More bad lines than MAX_SKIPPED={policy.max_skipped}. The first: {first} Repair the "
                "file, or raise MAX_SKIPPED."
            )
        if self.failure is not None:
            raise ValueError(self.failure)

    def summary(self) -> str:
        """For people: one line, and one for each problem named."""
        kinds = [(self.empty, "without text left out"), (self.split, "longer ones split")]
        kinds.append((self.skipped, "bad lines skipped"))
        told = "".join(f", {count} {kind}" for count, kind in kinds if count)
        lines = [f"{self.lines} lines, {self.documents} documents, {self.passages} passages{told}."]
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
        found: dict[str, Any] = json.loads(text)
        return cls(**{**found, "named": [Problem(**one) for one in found["named"]]})


def merge(parts: Iterable[tuple[Span, Report]]) -> Report:
    """One report of spans in order; line numbers become those of the files.

    Behind a span that stopped, lines cannot be numbered and problems are counted only.
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
