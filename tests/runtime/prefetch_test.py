"""Batches on their way to the devices."""

import threading

import jax
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.runtime.prefetch import Prefetch
from tests.training.toy_model import batch_at, batches_from


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, model=2))


def test_rows_are_spread_and_ids_stay_on_the_host(mesh):
    batch = {**batch_at(0), "passage_memory": {"states": np.ones((16, 2, 3))}}
    placed = put_batch(batch, mesh)
    assert set(placed) == set(batch) - {"passage_ids"}
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.is_equivalent_to(partitioning.batch_sharding(mesh), leaf.ndim)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_passages_are_spread_over_their_own_axis():
    mesh = make_mesh(MeshConfig(data=2, passages=4))
    batch = {"passage_memory": {"states": np.arange(96.0).reshape(4, 8, 3)}}
    states = put_batch(batch, mesh)["passage_memory"]["states"]
    assert states.sharding.shard_shape(states.shape) == (2, 2, 3)
    np.testing.assert_array_equal(states, batch["passage_memory"]["states"])


def test_rows_that_do_not_divide_are_refused(mesh):
    with pytest.raises(ValueError, match=r"BATCH_SIZE.*8 .*4 x 2"):
        put_batch(batch_at(0, rows=12), mesh, num_microbatches=2)


def test_batches_come_in_order_and_the_thread_ends(mesh):
    with Prefetch(batches_from(3), mesh) as batches:
        for step in (3, 4, 5):
            np.testing.assert_array_equal(next(batches)["tokens"], batch_at(step)["tokens"])
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_an_error_in_the_data_is_raised_where_its_batch_would_be(mesh):
    def broken():
        yield batch_at(0)
        raise ValueError("line 7 is not JSON")

    with Prefetch(broken(), mesh) as batches:
        next(batches)
        with pytest.raises(ValueError, match="line 7 is not JSON"):
            next(batches)


def test_the_end_of_the_data_ends_the_iteration(mesh):
    with Prefetch(iter([batch_at(0)]), mesh) as batches:
        assert len(list(batches)) == 1
