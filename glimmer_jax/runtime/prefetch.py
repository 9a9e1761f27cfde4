"""Batches on the devices before they are asked for: a thread prepares n + 1 while n is computed.

What is read while the device works: batch n + 1 on a thread, n at the device.
"""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from jax.sharding import Mesh

from glimmer_jax.partitioning import put_batch

_END = object()


class Prefetch:
    """Device batches made by a thread, one ahead. A context; leaving it stops the thread.

    An error in the source is raised where its batch would have come.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], mesh: Mesh, num_microbatches: int = 1):
        self._source = batches
        self._put = lambda batch: put_batch(batch, mesh, num_microbatches)
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        while self._thread.is_alive():
            # The thread may be waiting for room.
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> dict[str, Any]:
        item = self._queue.get()
        if item is _END:
            raise StopIteration
        if isinstance(item, Exception):
            raise item
        return item

    def _run(self) -> None:
        try:
            for batch in self._source:
                if self._stop.is_set():
                    return
                self._queue.put(self._put(batch))
            self._queue.put(_END)
        # Whatever it is, it belongs to the thread that trains, and is raised there.
        except Exception as error:  # noqa: BLE001
            self._queue.put(error)


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
