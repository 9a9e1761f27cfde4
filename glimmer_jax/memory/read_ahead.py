"""What is read while the device works: batch n + 1 on a thread, n at the device."""

import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class ReadAhead(Generic[T, U]):
    """`read` of each batch of a stream, one ahead of who takes them.

    Attributes:
      waited: seconds that takers have waited so far, but for the first batch of each stream, which
        has nothing before it to hide behind.
    """

    def __init__(self, read: Callable[[T], U]):
        self._read = read
        self.waited = 0.0

    def __call__(self, batches: Iterable[T]) -> Iterator[U]:
        """The batches in order, read; an error is raised where its batch would have come."""
        with concurrent.futures.ThreadPoolExecutor(1, "read-ahead") as reader:
            before: concurrent.futures.Future[U] | None = None
            first = True
            for batch in batches:
                reading = reader.submit(self._read, batch)
                if before is not None:
                    yield self._take(before, first)
                    first = False
                before = reading
            if before is not None:
                yield self._take(before, first)

    def _take(self, reading: concurrent.futures.Future[U], first: bool) -> U:
        began = time.monotonic()
        batch = reading.result()
        if not first:
            self.waited += time.monotonic() - began
        return batch
