"""The order of training examples: pure functions of the seed and of numbers, without any state.

An endless stream of examples can therefore start anywhere at the same cost. Shuffling sorts raw
64-bit output of PCG64, which NumPy guarantees to be the same in all its versions.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Examples for which the tasks of a mixture are drawn together.
BLOCK = 1024


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed of 32 bits for the part of a stream that has these numbers, which are at least 0."""
    entropy = (seed % 2**64, *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def permutation(seed: int, size: int) -> np.ndarray:
    """A random order of `range(size)`, int64 `[size]`."""
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")


# Of the current epochs of a mixture's tasks, KILT's eleven for example: sorting millions of numbers
# takes a while.
_epoch_order = functools.lru_cache(maxsize=32)(permutation)


def shuffled_epochs(seed: int, size: int, start: int, count: int) -> np.ndarray:
    """Indices of examples `start` to `start + count` of an endless stream of shuffled epochs.

    Args:
      seed: every epoch is in another order, which depends on it.
      size: number of examples in an epoch, at least 1.
      start: number of examples before these.
      count: number of indices.

    Returns:
      int64 `[count]`, each from 0 to `size - 1`.
    """
    parts = [np.zeros(0, np.int64)]
    while count > 0:
        epoch, first = divmod(start, size)
        parts.append(_epoch_order(derived_seed(seed, epoch), size)[first : first + count])
        start += len(parts[-1])
        count -= len(parts[-1])
    return np.concatenate(parts)


class Mixing:
    """Which task of a mixture each example comes from, in proportion to the tasks' rates.

    The first `BLOCK * n` examples hold every task's share to within a few examples, for every `n`.
    The order within a block is random. seqio draws every example's task independently: the same
    proportions on average, but a resumed run must repeat all draws.
    """

    def __init__(self, rates: Sequence[float], seed: int):
        """Fixes the order.

        Args:
          rates: relative number of examples of each task, above 0.
          seed: of the order within a block.
        """
        self._rates = [Fraction(rate) for rate in rates]
        self._seed = seed

    def counts(self, stop: int) -> np.ndarray:
        """Number of examples of each task among the first `stop`, int64 `[tasks]`."""
        block, rest = divmod(stop, BLOCK)
        return self._block_counts(block) + np.bincount(
            self._block(block)[:rest], minlength=len(self._rates)
        )

    def tasks(self, start: int, count: int) -> np.ndarray:
        """Tasks of examples `start` to `start + count`, int64 `[count]` indices of `rates`."""
        first = start // BLOCK
        blocks = [self._block(block) for block in range(first, (start + count) // BLOCK + 1)]
        return np.concatenate(blocks)[start - first * BLOCK :][:count]

    def _block(self, number: int) -> np.ndarray:
        counts = self._block_counts(number + 1) - self._block_counts(number)
        order = permutation(derived_seed(self._seed, number), BLOCK)
        return np.repeat(np.arange(len(self._rates)), counts)[order]

    def _block_counts(self, blocks: int) -> np.ndarray:
        """Number of examples of each task in the first blocks, which sums to all their examples.

        Each task takes its share of what the tasks before it left, rounded down. Every count grows
        by at most one with each example and never shrinks. Fractions, because rounding errors could
        make it shrink.
        """
        counts, rest, total = [], blocks * BLOCK, sum(self._rates)
        for rate in self._rates:
            counts.append(math.floor(rest * rate / total))
            rest -= counts[-1]
            total -= rate
        return np.array(counts, np.int64)
