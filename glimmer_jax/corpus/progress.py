"""How far the reading of a corpus is, for people."""

import logging
import time
from collections.abc import Sequence

from etils import epath

from glimmer_jax.corpus.report import Report

logger = logging.getLogger(__name__)

EVERY_SECONDS = 10.0


class Progress:
    """Counts bytes as they are read and logs, now and then, rate and time left."""

    def __init__(self, paths: Sequence[str], report: Report, every_seconds: float = EVERY_SECONDS):
        self._total = sum(epath.Path(path).stat().length for path in paths)
        self._report = report
        self._every = every_seconds
        self._read = 0
        self._begun = self._told = time.monotonic()

    def read(self, count: int) -> None:
        """`count` more bytes of the files, packed ones as they lie there."""
        self._read += count
        now = time.monotonic()
        if now - self._told >= self._every:
            self._told = now
            rate = self._read / max(now - self._begun, 1e-9)
            logger.info(
                "corpus: %.2f of %.2f GB, %.1f MB/s, %d documents, %d passages, %d bad lines, "
                "%.0f s left",
                self._read / 1e9,
                self._total / 1e9,
                rate / 1e6,
                self._report.documents,
                self._report.passages,
                self._report.skipped,
                (self._total - self._read) / max(rate, 1e-9),
            )
