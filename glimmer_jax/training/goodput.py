"""Goodput: the share of a run's wall-clock time that was spent in training steps."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

# Close to the start of the process, because modules are imported first.
_PROCESS_START = time.monotonic()


@dataclasses.dataclass(frozen=True)
class PreviousRuns:
    """Totals of the processes that trained a run before this one, as far as its log records them.

    The time between a process's last log line and its end is unknown and is not counted.
    """

    alive_seconds: float = 0.0
    useful_seconds: float = 0.0  # spent in training steps that are still part of the run
    skipped_steps: int = 0  # as counted by `log.SkippedSteps`

    @classmethod
    def from_log(cls, lines: list[dict[str, Any]], step: int) -> "PreviousRuns":
        """Totals from the parsed lines of `metrics.jsonl`.

        Args:
          lines: all lines.
          step: the step that the run resumes from; later steps were lost to a kill.
        """
        names = ("train/alive_seconds", "train/goodput", "train/skipped_steps")
        lines = [
            line for line in lines if all(math.isfinite(line.get(name, math.nan)) for name in names)
        ]
        if not lines:
            return cls()
        alive_seconds = lines[-1]["train/alive_seconds"]
        kept = [line for line in lines if line["step"] <= step]
        if not kept:
            return cls(alive_seconds)
        useful_seconds = kept[-1]["train/goodput"] * kept[-1]["train/alive_seconds"]
        return cls(alive_seconds, useful_seconds, int(kept[-1]["train/skipped_steps"]))


class Goodput:
    """Measures goodput over this process and the previous ones.

    Lost time is everything up to the end of the first step, and what callers mark with `lost_time`:
    evaluations and waiting for checkpoints. `PreviousRuns` accounts for steps that a kill undid.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        previous: PreviousRuns = PreviousRuns(),
    ):
        self._now = now
        self._previous = previous
        self._start = min(_PROCESS_START, now())
        self._lost = 0.0

    def mark_started(self) -> None:
        """Counts all time so far as lost."""
        self._lost = self._now() - self._start

    @contextlib.contextmanager
    def lost_time(self) -> Iterator[None]:
        """Counts the time inside the context as lost."""
        start = self._now()
        try:
            yield
        finally:
            self._lost += self._now() - start

    def report(self) -> dict[str, float]:
        """`goodput` from 0 to 1, and `alive_seconds`, the wall-clock time it refers to."""
        alive = self._now() - self._start
        total = self._previous.alive_seconds + alive
        useful = self._previous.useful_seconds + alive - self._lost
        return {"goodput": useful / total if total > 0 else 0.0, "alive_seconds": total}
