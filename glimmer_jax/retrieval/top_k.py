"""Exact search: the k best of all passages for each question, on the mesh or from disk.

The index is processed in blocks, each distributed over all devices. A device scores its rows of a
block and keeps the k best so far; at the end the k best of all devices are merged. Search is exact,
and of equal scores the earlier passage comes first.

Blocks stay on the devices if they fit, and are read again for every pass if they do not. Both cases
run the same compiled program over the same blocks, so the results are the same bits.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax import axes, partitioning
from glimmer_jax.retrieval.index import DTYPE, Index
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.prefetch import ReadAhead

# Rows of a block on one device: 96 MiB of vectors of 768.
BLOCK_ROWS = 65536
# Questions scored at a time: 64 MiB of scores per block.
QUESTIONS = 256
# Questions of one pass over the index; each keeps k scores and rows on the devices.
PASS_QUESTIONS = 32768

Best = tuple[jax.Array, jax.Array]


class Search:
    """Search over one index.

    Attributes:
      on_mesh: whether the index stays on the devices.
    """

    def __init__(
        self, index: Index, mesh: Mesh, bytes_per_device: int, block_rows: int = BLOCK_ROWS
    ):
        """Loads the index onto the devices if it fits.

        Args:
          index: of n passages.
          mesh: devices of all processes.
          bytes_per_device: limit for the part of the index on each device; a larger index is read
            from disk for every pass.
          block_rows: rows of a block on one device.
        """
        self.index = index
        self.mesh = mesh
        self._rows = min(block_rows, -(-len(index) // mesh.size))
        self._starts = range(0, len(index), self._rows * mesh.size)
        held = len(self._starts) * self._rows * index.vector_dim * DTYPE.itemsize
        self.on_mesh = held <= bytes_per_device
        self._by_row = NamedSharding(mesh, partitioning.spec((axes.MEMORY_ROWS,)))
        blocks = STOP.polling(self._starts, every=1)
        self._held = [self._load(start) for start in blocks] if self.on_mesh else None

    def __call__(
        self, questions: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each question.

        Args:
          questions: float32 `[n, E]`.
          k: passages per question.
          allowed: bool `[n]`, whether each row of the index may be returned; None allows all.

        Returns:
          float32 scores `[n, k]` and int32 rows `[n, k]`, best first; -inf and -1 if there are
          fewer than k.

        Raises:
          ValueError: `k` or a shape is out of range, or the index is damaged.
        """
        expected = (self.index.vector_dim, (len(self.index),))
        actual = (questions.shape[1], expected[1] if allowed is None else allowed.shape)
        if k < 1 or expected != actual:
            raise ValueError(
                f"NUM_PASSAGES must be at least 1, questions must have {expected[0]} channels, and the "
                f"mask must have shape {expected[1]}; got k={k}, {actual[0]} and {actual[1]}."
            )
        passes = [
            self._one_pass(questions[start : start + PASS_QUESTIONS], k, allowed)
            for start in range(0, len(questions), PASS_QUESTIONS)
        ]
        if not passes:
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
        scores, rows = (np.concatenate(part) for part in zip(*passes, strict=True))
        return scores, np.where(np.isneginf(scores), -1, rows)

    def _one_pass(
        self, questions: np.ndarray, k: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        count, everywhere = len(questions), partitioning.replicated(self.mesh)
        padded = np.zeros((-(-count // QUESTIONS) * QUESTIONS, questions.shape[1]), np.float32)
        padded[:count] = questions
        # Not by `device_put`, which has all processes compare what they put there.
        batches = [
            self._put(padded[start : start + QUESTIONS], everywhere)
            for start in range(0, len(padded), QUESTIONS)
        ]
        shape = (self.mesh.size, QUESTIONS, k)
        empty = (np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32))
        best: list[Best] = [(self._spread(empty[0]), self._spread(empty[1])) for _ in batches]
        for start, block in zip(self._starts, self._blocks(), strict=True):
            STOP.poll_together()
            mask = self._spread(self._mask(start, allowed))
            for i, batch in enumerate(batches):
                best[i] = _step(best[i], batch, block, mask, np.int32(start), mesh=self.mesh)
            # Blocks that wait to be scored must not pile up; the next is being read meanwhile.
            jax.block_until_ready(best)
        merged = [_merge(part, mesh=self.mesh) for part in best]
        scores, rows = (np.concatenate(part)[:count] for part in zip(*merged, strict=True))
        return scores, rows

    def _blocks(self) -> Iterator[jax.Array]:
        """Blocks in order; from disk one is read while the one before it is scored."""
        if self._held is not None:
            yield from self._held
            return
        yield from ReadAhead(self._load)(self._starts)

    def _load(self, start: int) -> jax.Array:
        """float16 `[devices * rows, E]` from row `start` on; each process reads its own part."""
        shape = (self.mesh.size * self._rows, self.index.vector_dim)

        def part(place: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = (place or (slice(None),))[0].indices(shape[0])
            out = np.zeros((last - first, shape[1]), DTYPE)
            stop = min(start + last, len(self.index))
            if start + first < stop:
                out[: stop - start - first] = self.index.read(start + first, stop)
            return out

        return jax.make_array_from_callback(shape, self._by_row, part)

    def _mask(self, start: int, allowed: np.ndarray | None) -> np.ndarray:
        """bool `[devices * rows]`: rows of the block from `start` on that may be found."""
        rows = np.arange(start, start + self.mesh.size * self._rows)
        mask = rows < len(self.index)
        if allowed is not None:
            mask[mask] = allowed[rows[mask]]
        return mask

    def _spread(self, x: np.ndarray) -> jax.Array:
        return self._put(x, self._by_row)

    def _put(self, x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda place: x[place or ...])


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _step(
    best: Best,
    questions_QE: jax.Array,
    block_RE: jax.Array,
    mask_R: jax.Array,
    first_row: jax.Array,
    *,
    mesh: Mesh,
) -> Best:
    """Each device's k best so far, scores and rows `[devices, Q, k]`, with a block taken in."""
    rows, replicated = PartitionSpec(mesh.axis_names), PartitionSpec()

    def device(scores_1Qk, rows_1Qk, questions_QE, block_RE, mask_R, first_row):
        # float32 products, because bfloat16 or TF32 would change the order of passages.
        scores_QR = jnp.dot(
            questions_QE, block_RE.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
        )
        # top_k would rank -0.0 below 0.0, though they are equal.
        scores_QR = jnp.where(scores_QR == 0, 0.0, scores_QR)
        scores_QR = jnp.where(mask_R[None], scores_QR, -jnp.inf)
        k, count = scores_1Qk.shape[2], block_RE.shape[0]
        new_scores, places = jax.lax.top_k(scores_QR, min(k, count))
        first = first_row + jax.lax.axis_index(mesh.axis_names) * count
        # Previous rows are smaller and come first, because top_k prefers the first of equal scores.
        scores = jnp.concatenate([scores_1Qk[0], new_scores], axis=1)
        candidates = jnp.concatenate([rows_1Qk[0], first + places], axis=1)
        scores, places = jax.lax.top_k(scores, k)
        return scores[None], jnp.take_along_axis(candidates, places, axis=1)[None]

    spread = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(rows, rows, replicated, rows, rows, replicated),
        out_specs=(rows, rows),
    )
    return spread(*best, questions_QE, block_RE, mask_R, first_row)


@functools.partial(jax.jit, static_argnames="mesh")
def _merge(best: Best, *, mesh: Mesh) -> Best:
    """The k best of all devices, `[Q, k]`, everywhere; of equal scores the smaller row first."""
    everywhere = partitioning.replicated(mesh)
    k = best[0].shape[2]
    scores, rows = (
        jax.lax.with_sharding_constraint(x.transpose(1, 0, 2).reshape(x.shape[1], -1), everywhere)
        for x in best
    )
    # Devices hold interleaved parts of the index, so their order is not that of the rows.
    falling, rows = jax.lax.sort((-scores, rows), num_keys=2)
    return -falling[:, :k], rows[:, :k]
