"""Intervals of the experiments, compared with known values and with simulations."""

import numpy as np
import pytest

from experiments import claim_statistics
from experiments.claim_statistics import T_QUANTILES, bootstrap_interval, estimate, t_interval


def test_t_interval_of_a_textbook_sample():
    # Mean 3, standard deviation sqrt(2.5), 4 degrees of freedom: 3 +- 2.7764 * sqrt(2.5 / 5).
    low, high = t_interval([1, 2, 3, 4, 5])
    assert low == pytest.approx(1.0368, abs=1e-4) and high == pytest.approx(4.9632, abs=1e-4)
    assert t_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert t_interval([0.3]) == (-np.inf, np.inf)


def test_t_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    degrees = np.arange(1, len(T_QUANTILES) + 1)
    np.testing.assert_allclose(T_QUANTILES, stats.t.ppf(0.975, degrees), atol=1e-4)


def test_bootstrap_over_one_seed_and_single_questions_is_that_of_a_mean():
    draw = np.random.default_rng(0)
    rows = (draw.random((1, 400)) < 0.3).astype(float)
    low, high = bootstrap_interval({"a": rows}, {"a": np.arange(400)})
    error = rows.std() / 20
    assert low == pytest.approx(rows.mean() - 1.96 * error, abs=0.006)
    assert high == pytest.approx(rows.mean() + 1.96 * error, abs=0.006)


def test_bootstrap_keeps_pages_together_and_resamples_seeds():
    draw = np.random.default_rng(1)
    by_page = draw.normal(size=(1, 50))
    rows = np.repeat(by_page, 8, axis=1)  # eight equal questions per page
    pages = np.repeat(np.arange(50), 8)
    low, high = bootstrap_interval({"a": rows}, {"a": pages})
    assert high - low == pytest.approx(2 * 1.96 * by_page.std() / 50**0.5, rel=0.1)
    # Without variation between questions, what is left is that between seeds.
    seeds = draw.normal(size=(6, 1)) * np.ones((1, 400))
    low, high = bootstrap_interval({"a": seeds}, {"a": pages})
    assert high - low == pytest.approx(2 * 1.96 * seeds[:, 0].std() / 6**0.5, rel=0.2)


def test_estimate_averages_tasks_equally_and_has_the_outer_bounds():
    values = {"a": np.full((3, 10), 1.0), "b": np.array([[0.0] * 90, [0.1] * 90, [0.2] * 90])}
    pages = {"a": np.arange(10), "b": np.arange(90)}
    found = estimate(values, pages)
    assert found.mean == pytest.approx(0.55)
    np.testing.assert_allclose(found.by_seed, [0.5, 0.55, 0.6])
    assert found.t == pytest.approx(t_interval(found.by_seed))
    assert found.low == min(found.t[0], found.bootstrap[0]) == found.t[0]
    assert found.high == max(found.t[1], found.bootstrap[1])
    with pytest.raises(ValueError, match=r"seeds.*\[2, 3\]"):
        estimate({**values, "b": values["b"][:2]}, pages)


def test_both_intervals_cover_the_truth_about_as_often_as_they_promise():
    draw = np.random.default_rng(2)
    covered = {"t": 0, "bootstrap": 0}
    trials = 60
    for _ in range(trials):
        quality = 0.6 + 0.03 * draw.normal(size=(5, 1))
        values = {"a": (draw.random((5, 200)) < quality).astype(float)}
        pages = {"a": np.arange(200) // 2}
        low, high = bootstrap_interval(values, pages, samples=500)
        covered["bootstrap"] += low <= 0.6 <= high
        low, high = t_interval(values["a"].mean(axis=1).tolist())
        covered["t"] += low <= 0.6 <= high
    assert covered["t"] >= 0.85 * trials
    assert covered["bootstrap"] >= 0.75 * trials
    assert claim_statistics.SAMPLES >= 1000
