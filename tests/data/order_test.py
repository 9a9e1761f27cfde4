"""The order of training examples: the same wherever it starts, in the rates' proportions."""

import itertools

import numpy as np
import pytest

from glimmer_jax.data.order import BLOCK, Mixing, derived_seed, shuffled_epochs


def test_derived_seeds_differ_and_fit_into_32_bits():
    seeds = [derived_seed(seed, *n) for seed in (-1, 0, 2**63) for n in ((1,), (2,), (1, 2))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_every_epoch_holds_every_example_once(size):
    order = shuffled_epochs(3, size, 0, 4 * size).reshape(4, size)
    assert (np.sort(order, axis=1) == np.arange(size)).all()
    if size == 50:
        assert len({tuple(epoch) for epoch in order}) == 4


def test_shuffled_epochs_start_anywhere():
    whole = shuffled_epochs(3, 7, 0, 60)
    for start, count in itertools.product((0, 1, 6, 7, 8, 20), (0, 1, 6, 7, 30)):
        np.testing.assert_array_equal(
            shuffled_epochs(3, 7, start, count), whole[start : start + count]
        )
    assert (whole != shuffled_epochs(4, 7, 0, 60)).any()
    far = shuffled_epochs(3, 7, 10**15, 5)
    np.testing.assert_array_equal(far[2:], shuffled_epochs(3, 7, 10**15 + 2, 3))


def test_the_order_is_the_same_in_every_version():
    """Runs resume after an upgrade of NumPy or of this package."""
    assert shuffled_epochs(0, 8, 0, 16).tolist() == EPOCHS
    assert Mixing([1, 2], 0).tasks(0, 16).tolist() == TASKS


EPOCHS = [0, 3, 4, 6, 5, 7, 2, 1, 2, 7, 5, 3, 1, 6, 4, 0]
TASKS = [0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1]
RATES = [[1.0], [1, 1, 1], [0.5, 1, 1], [3, 0.1, 7, 1e-9], [1 / 3, 2 / 3], [10] * 11]


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_counts_are_those_of_the_tasks_before(rates):
    mixing = Mixing(rates, seed=5)
    tasks = mixing.tasks(0, 5 * BLOCK)
    for stop in (0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 7):
        counts = np.bincount(tasks[:stop], minlength=len(rates))
        np.testing.assert_array_equal(mixing.counts(stop), counts)
        np.testing.assert_array_equal(mixing.tasks(stop, 300), tasks[stop : stop + 300])


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_tasks_have_their_share(rates):
    mixing, stop = Mixing(rates, seed=5), 10**9 + 123
    counts = mixing.counts(stop)
    assert counts.sum() == stop
    shares = np.array(rates) / sum(rates)
    # Of whole blocks to within a few examples; the last block adds its own.
    assert np.abs(counts - stop * shares).max() < BLOCK


def test_counts_never_shrink():
    mixing = Mixing([0.3, 1e-3, 5, 0.7, 0.7], seed=0)
    counts = np.array([mixing._block_counts(block) for block in range(3000)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts.sum(axis=1) == BLOCK * np.arange(3000)).all()


def test_seeds_mix_differently():
    assert (Mixing([1, 1], 0).tasks(0, 100) != Mixing([1, 1], 1).tasks(0, 100)).any()
