"""Batches on the devices before they are asked for: a thread prepares n + 1 while n is computed."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from glimmer_jax import axes, partitioning

# Ids serve lookups and reports on the host; the model never sees them.
HOST_ONLY = ("passage_ids",)
_END = object()


def put_batch(batch: dict[str, Any], mesh: Mesh, num_microbatches: int = 1) -> dict[str, Any]:
    """This process's rows of a batch -> global arrays, rows and passages spread over the mesh.

    Args:
      batch: arrays of the rows `partitioning.own_rows`, whole in every other dimension.
      mesh: the devices.
      num_microbatches: into which the rows must divide, too.

    Raises:
      ValueError: the rows do not divide evenly over devices and microbatches.
    """
    batch = {name: value for name, value in batch.items() if name not in HOST_ONLY}
    ways = partitioning.parts(mesh.shape, axes.BATCH)
    # Rows of the whole batch for each one here.
    scale = ways // len(partitioning.own_rows(mesh, ways))
    rows = {np.shape(leaf)[0] * scale for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or min(rows) % (ways * num_microbatches):
        shapes = {name: np.shape(value) for name, value in batch.items() if hasattr(value, "shape")}
        raise ValueError(
            f"A batch must have one number of rows, a multiple of {ways * num_microbatches} "
            f"(devices that share it x microbatches = {ways} x {num_microbatches}); got {shapes}. "
            "Change BATCH_SIZE, the mesh or num_microbatches."
        )
    own = partitioning.own_rows(mesh, rows.pop())

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX's types allow for it; its callers do not
            first, last, _ = index[0].indices(len(own) * scale)
            here = int(np.searchsorted(own, first))
            return leaf[(slice(here, here + last - first), *index[1:])]

        shape = (len(own) * scale, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch, partitioning.batch_shardings(batch, mesh))


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
