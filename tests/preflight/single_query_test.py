"""Attention with a single query, as in decoding, uses the matrix unit of a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from glimmer_jax.nn import attention
from glimmer_jax.preflight import chips, hlo

H, C, KEYS = 12, 64, 4096  # heads of T5 Base

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def cycles(function, groups):
    device = SingleDeviceSharding(chips.devices(chips.parse_topology("v5e:2x2"))[0])
    shapes = ((2, 1, H, C), (2, groups, KEYS, C), (2, groups, KEYS, C))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device) for shape in shapes]
    mask = jax.ShapeDtypeStruct((2, 1, 1, KEYS), bool, sharding=device)

    def attend(query, key, value, mask):
        key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
        return function(query, key, value, mask, None, None)

    program = jax.jit(attend).lower(*arrays, mask).compile()
    return sum(hlo.estimated_cycles(program.as_text()).values())


def test_a_padded_query_takes_less_than_half():
    assert 2 * cycles(attention.attend, H) < cycles(attention._attend, H)


def test_heads_that_share_a_key_head_need_no_padding():
    assert cycles(attention.attend, 1) == cycles(attention._attend, 1)
