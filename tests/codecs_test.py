"""Codecs, and rounding at the cut with the gradient of the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import codecs

STATES = (np.random.default_rng(0).normal(size=(3, 5, 8)) * 100).astype(np.float32)


@pytest.mark.parametrize("name, dtype", [("bf16", jnp.bfloat16), ("f32", jnp.float32)])
def test_encoded_arrays_have_the_specified_shapes_and_dtypes(name, dtype):
    codec = codecs.get(name)
    assert codec.name == name
    arrays = codec.encode(STATES)
    specs = codec.array_specs(8)
    assert specs.keys() == arrays.keys()
    for key, (trailing, want) in specs.items():
        assert arrays[key].shape == (3, 5, *trailing)
        assert arrays[key].dtype == want == dtype


def test_decoding_gives_the_dtype_asked_for():
    arrays = codecs.get("bf16").encode(STATES)
    assert codecs.get("bf16").decode(arrays, jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(codecs.get("f32").decode({"states": STATES}, np.float32), STATES)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match=r"Unknown memory codec 'int3'; choose one of \['bf16'"):
        codecs.get("int3")


@pytest.mark.parametrize("jit", [False, True])
def test_straight_through_rounds_exactly_and_has_the_gradient_of_the_identity(jit):
    codec = codecs.get("bf16")

    def rounded(x):
        return codecs.straight_through(codec, x)

    # Numpy rounds to nearest even by itself: the compiler may not skip the round trip under jit.
    want = STATES.astype(jnp.bfloat16).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=STATES.shape).astype(np.float32)
    out, vjp = jax.vjp(jax.jit(rounded) if jit else rounded, STATES)
    np.testing.assert_array_equal(out, want)
    assert (np.asarray(out) != STATES).mean() > 0.9
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)


def test_straight_through_rounds_between_fused_operations():
    def program(x, kernel):
        return jnp.tanh(codecs.straight_through(codecs.get("bf16"), x * 2.0)) @ kernel

    kernel = np.eye(8, dtype=np.float32)
    want = np.tanh((STATES * 2).astype(jnp.bfloat16).astype(np.float64))
    np.testing.assert_allclose(jax.jit(program)(STATES, kernel), want, rtol=1e-6)


def test_straight_through_keeps_the_dtype():
    out = codecs.straight_through(codecs.get("bf16"), jnp.asarray(STATES, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
