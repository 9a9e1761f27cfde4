"""Progress of long work: count, rate and time left, in at most one line every few seconds."""

import collections
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)
EVERY_SECONDS = 10.0
T = TypeVar("T")


class Progress:
    """Counts finished units of work, from any thread, and logs lines such as

        memory: 4096 of 100000 passages, 51.2 passages/s, 12% padding, 31m12s left

    Attributes:
      done: units finished so far.
      totals: sums of the other amounts given to `advance`.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        details: Callable[[], str] = str,
        emit: Callable[[str], None] = logger.info,
        every_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts measuring.

        Args:
          name: what is worked on; begins every line.
          total: number of units, or None if unknown.
          unit: its plural; `bytes` are shown as GB and MB/s.
          done: units finished before, by an earlier run.
          details: further facts for a line, computed when one is due.
          emit: takes the lines.
          every_seconds: between two lines; None: EVERY_SECONDS.
          clock: seconds.
        """
        self.name = name
        self.total = total
        self.done = done
        self.totals: collections.Counter[str] = collections.Counter()
        self._unit = unit
        self._details = details
        self._emit = emit
        self._every = EVERY_SECONDS if every_seconds is None else every_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._logged = clock()
        self.restart()

    def restart(self) -> None:
        """Measures rates from here on, so that compilation, for instance, does not count."""
        self._began, self._first = self._clock(), self.done

    def advance(self, count: int = 1, **amounts: float) -> None:
        """`count` more units are finished; adds `amounts` to `totals`. Logs where a line is due."""
        with self._lock:
            self.done += count
            for name, amount in amounts.items():
                self.totals[name] += amount  # type: ignore[assignment]
            due = self._clock() - self._logged >= self._every
            if due:
                self._logged = self._clock()
        if due:
            self.log()

    @property
    def seconds(self) -> float:
        """Since the measuring began; never 0."""
        return max(self._clock() - self._began, 1e-9)

    @property
    def rate(self) -> float:
        """Units per second."""
        return (self.done - self._first) / self.seconds

    @property
    def seconds_left(self) -> float:
        """At this rate; infinite where the total is not known, and before anything is done."""
        if self.total is None or not self.rate:
            return math.inf
        return (self.total - self.done) / self.rate

    def log(self, details: str = "") -> None:
        """Logs a line now."""
        unit, done, total, rate = self._unit, self.done, self.total, self.rate
        if unit == "bytes":
            of = "" if total is None else f" of {total / 1e9:.3g}"
            count = f"{done / 1e9:.3g}{of} GB, {rate / 1e6:.3g} MB/s"
        else:
            of = "" if total is None else f" of {total}"
            count = f"{done}{of} {unit}, {rate:.3g} {unit}/s"
        left = "" if total is None else f"{format_seconds(self.seconds_left)} left"
        facts = (count, self._details(), details, left)
        self._emit(f"{self.name}: {', '.join(fact for fact in facts if fact)}")


def with_progress(items: Sequence[T], name: str, unit: str) -> Iterator[T]:
    """The items; logs how many of them are done."""
    progress = Progress(name, len(items), unit)
    for item in items:
        yield item
        progress.advance()


def format_seconds(seconds: float) -> str:
    """`7384.2` -> `2h03m`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
