"""Buckets against a scalar version written from the description, and the bias they index."""

import math

import jax
import numpy as np
import pytest

from glimmer_jax.nn.relative_position import RelativePositionBias, buckets


def scalar_bucket(distance, bidirectional, num_buckets, max_distance):
    """One bucket, in exact arithmetic: the largest b with max_distance**b <= n**... by integers."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = num_buckets if distance > 0 else 0
        n = abs(distance)
    else:
        n = max(-distance, 0)
    exact = num_buckets // 2
    if n < exact:
        return offset + n
    steps = num_buckets - exact
    # The largest s <= steps - 1 with exact * (max/exact)**(s/steps) <= n, compared as integers.
    s = 0
    while s + 1 < steps and max_distance ** (s + 1) * exact ** (steps - s - 1) <= n**steps:
        s += 1
    return offset + exact + s


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20)])
def test_buckets_equal_an_independent_scalar_version(bidirectional, num_buckets, max_distance):
    kwargs = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    got = buckets(150, 150, **kwargs)
    scalar = {d: scalar_bucket(d, **kwargs) for d in range(-149, 150)}
    want = [[scalar[key - query] for key in range(150)] for query in range(150)]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.int32


def test_distances_beyond_the_maximum_share_the_last_bucket():
    row = buckets(1, 2000, bidirectional=True, num_buckets=32, max_distance=128)[0]
    assert set(row[128:]) == {31}
    assert row.max() == 31 and row[0] == 0 and row[1] == 17


def test_later_keys_share_bucket_zero_in_a_causal_stack():
    got = buckets(6, 6, bidirectional=False, num_buckets=32, max_distance=128)
    assert not got[np.triu_indices(6)].any()
    np.testing.assert_array_equal(got[5], [5, 4, 3, 2, 1, 0])


def test_bias_reads_its_table_by_head_and_bucket():
    bias = RelativePositionBias(num_heads=2, num_buckets=32, max_distance=128, bidirectional=True)
    table = np.arange(64, dtype=np.float32).reshape(2, 32)
    out = bias.apply({"params": {"rel_embedding": table}}, 5, 7)
    index = buckets(5, 7, bidirectional=True, num_buckets=32, max_distance=128)
    assert out.shape == (2, 5, 7) and out.dtype == np.float32
    np.testing.assert_array_equal(out, table[:, index])


def test_bias_names_its_dimensions():
    bias = RelativePositionBias(num_heads=2, num_buckets=32, max_distance=128, bidirectional=True)
    boxed = jax.eval_shape(lambda: bias.init(jax.random.key(0), 3, 3))["params"]["rel_embedding"]
    assert boxed.names == ("heads", "relpos_buckets")
    assert math.prod(boxed.value.shape) == 64
