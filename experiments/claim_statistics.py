"""Means over seeds with two intervals: over seeds alone, and over seeds and pages.

The t interval over per-seed means includes the randomness of training. The bootstrap resamples seeds
and pages, and so includes the choice of test questions. A verdict requires both.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; the last one serves all others, and
# its intervals are slightly too wide.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip
SAMPLES = 4000  # with 1,000 pages, 32 MB of weights


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with 95 % intervals."""

    mean: float
    by_seed: list[float]
    t: tuple[float, float]
    bootstrap: tuple[float, float]

    @property
    def low(self) -> float:
        """The lower one of the two lower bounds."""
        return min(self.t[0], self.bootstrap[0])

    @property
    def high(self) -> float:
        """The higher one of the two upper bounds."""
        return max(self.t[1], self.bootstrap[1])


def estimate(values: Mapping[str, np.ndarray], pages: Mapping[str, np.ndarray]) -> Estimate:
    """The mean over tasks, averaged over seeds.

    Args:
      values: task -> float64 `[S, n]`, for each seed and question; for a difference of two arms, the
        differences.
      pages: task -> int64 `[n]`, number of each question's page, shared by the tasks.

    Raises:
      ValueError: no task, or tasks with different numbers of seeds.
    """
    counts = {len(rows) for rows in values.values()}
    if len(counts) != 1:
        raise ValueError(
            f"values must have the same number of seeds for every task, got {sorted(counts)}."
        )
    by_seed = np.mean([rows.mean(axis=1) for rows in values.values()], axis=0)
    return Estimate(
        mean=float(by_seed.mean()),
        by_seed=by_seed.tolist(),
        t=t_interval(by_seed.tolist()),
        bootstrap=bootstrap_interval(values, pages, SAMPLES),
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval for the mean; infinite for fewer than two values."""
    if len(values) < 2:
        return -np.inf, np.inf
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    half = quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def bootstrap_interval(
    values: Mapping[str, np.ndarray],
    pages: Mapping[str, np.ndarray],
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile 95 % interval of the mean over tasks; resamples seeds and pages with replacement.

    Questions of a page stay together, in all tasks and seeds.

    Args:
      values: task -> float64 `[S, n]`.
      pages: task -> int64 `[n]`.
      samples: number of resamples.
      seed: of the resampling.
    """
    num_pages = 1 + max(int(numbers.max()) for numbers in pages.values())
    sums, counts = {}, {}
    for task, rows in values.items():
        sums[task] = np.stack([np.bincount(pages[task], row, num_pages) for row in rows])
        counts[task] = np.bincount(pages[task], minlength=num_pages).astype(float)
    # Pages without any of these questions would only add noise.
    used = np.flatnonzero(sum(counts.values()))
    num_seeds = len(next(iter(values.values())))
    page_weights = _weights(len(used), samples, seed)
    seed_weights = _weights(num_seeds, samples, seed + 1) / num_seeds
    total = np.zeros(samples)
    for task in values:
        by_seed = page_weights @ sums[task][:, used].T
        drawn = np.maximum(page_weights @ counts[task][used], 1)
        total += (seed_weights * by_seed).sum(axis=1) / drawn
    low, high = np.quantile(total / len(values), [0.025, 0.975])
    return float(low), float(high)


@functools.lru_cache(4)
def _weights(count: int, samples: int, seed: int) -> np.ndarray:
    """How often each of `count` items is drawn, float64 `[samples, count]`; equal in all contrasts."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(count, np.full(count, 1 / count), samples).astype(float)
