"""How far a build is: rates, padding, bytes and time left, for people and for metrics writers."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)
EVERY_SECONDS = 10.0
T = TypeVar("T")


def counted(items: Sequence[T], what: str) -> Iterator[T]:
    """The items; says now and then how many of them are done, and when the rest will be."""
    begun = told = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - told >= EVERY_SECONDS:
            told = now
            left = (now - begun) / number * (len(items) - number)
            logger.info("%s: %d of %d, %.0f s left", what, number, len(items), left)
        yield item


class Progress:
    """Counts from the computing and the writing thread, and reports now and then."""

    def __init__(
        self,
        passages: int,
        report: Callable[[Mapping[str, float]], None] | None,
        every_seconds: float,
        what: str = "memory",
        floor: float | None = None,
    ):
        """Starts the clock.

        Args:
          passages: that are to be done.
          report: gets the numbers of each report.
          every_seconds: between reports.
          what: is made, for people.
          floor: tokens a second that matrix products alone would allow, if that is known.
        """
        self._what = what
        self._wanted = passages
        self._floor = floor
        self._report = report
        self._every = every_seconds
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()
        self._passages = self._tokens = self._computed = self._bytes = 0

    def encoded(self, passages: int, tokens: int, computed: int) -> None:
        """A batch is done: real passages and tokens, and tokens computed with padding."""
        with self._lock:
            self._passages += passages
            self._tokens += tokens
            self._computed += computed
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._say()

    def wrote(self, num_bytes: int) -> None:
        """A shard is on disk."""
        with self._lock:
            self._bytes += num_bytes

    def _rates(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._start, 1e-9)
        tokens_per_s = self._tokens / seconds
        return {
            "passages_per_s": self._passages / seconds,
            "tokens_per_s": tokens_per_s,
            "of_floor": tokens_per_s / self._floor if self._floor else math.nan,
            "padding": 1.0 - self._tokens / self._computed if self._computed else 0.0,
            "seconds": seconds,
        }

    def _say(self) -> None:
        rates = self._rates()
        left = (self._wanted - self._passages) / max(rates["passages_per_s"], 1e-9)
        logger.info(
            "%s: %d of %d passages, %.1f passages/s, %.0f tokens/s%s, %.1f%% padding, %.1f MB "
            "written, %.0f s left",
            self._what,
            self._passages,
            self._wanted,
            rates["passages_per_s"],
            rates["tokens_per_s"],
            f" ({rates['of_floor']:.0%} of the floor)" if self._floor else "",
            100 * rates["padding"],
            self._bytes / 1e6,
            left,
        )
        if self._report is not None:
            values = {"passages": self._passages, "bytes": self._bytes, "seconds_left": left}
            self._report({**rates, **values})

    def finish(self) -> dict[str, float]:
        """The last report, and the rates of the whole run."""
        rates = self._rates()
        self._say()
        return rates
