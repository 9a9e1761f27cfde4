"""Batches on the devices before they are asked for: a thread prepares n + 1 while n is computed."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

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
