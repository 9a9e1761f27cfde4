"""Codecs, and rounding at the cut with the gradient of the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import codecs

STATES = (np.random.default_rng(0).normal(size=(3, 5, 8)) * 100).astype(np.float32)


@pytest.mark.parametrize("name", ["bf16", "f32", "int8"])
def test_encoded_arrays_have_the_specified_shapes_and_dtypes(name):
    codec = codecs.get(name)
    assert codec.name == name
    arrays = codec.encode(STATES)
    specs = codec.array_specs(8)
    assert specs.keys() == arrays.keys()
    for key, (trailing, want) in specs.items():
        assert arrays[key].shape == (3, 5, *trailing)
        assert arrays[key].dtype == want


def test_decoding_gives_the_dtype_asked_for():
    arrays = codecs.get("bf16").encode(STATES)
    assert codecs.get("bf16").decode(arrays, jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(codecs.get("f32").decode({"states": STATES}, np.float32), STATES)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match=r"Unknown memory codec 'int3'; choose one of \['bf16'"):
        codecs.get("int3")


def _int8_by_numpy(states):
    """What the int8 codec gives back, written the plain way."""
    out = np.empty_like(states)
    kept = max(4, states.shape[-1] // 96)
    for index in np.ndindex(states.shape[:-1]):
        row = states[index]
        large = np.argsort(-np.abs(row), kind="stable")[:kept]
        rest = row.copy()
        rest[large] = 0
        scale = np.float32(np.abs(rest).max() / np.float32(127))
        out[index] = np.round(rest / (scale or np.float32(1))) * scale
        out[index][large] = row[large].astype(jnp.bfloat16).astype(np.float32)
    return out


def _normal(outliers, emb_dim=768, rows=64):
    """Normal states whose first channels are a hundred times the rest."""
    states = np.random.default_rng(0).normal(size=(rows, emb_dim)).astype(np.float32)
    states[:, :outliers] *= 100
    return states


def _relative_rms(error, of):
    return float(np.sqrt(np.square(error).mean() / np.square(of).mean()))


@pytest.mark.parametrize("outliers", [0, 1, 4, 8])
def test_int8_loses_less_than_one_percent_also_beside_outliers(outliers):
    states, codec = _normal(outliers), codecs.get("int8")
    decoded = np.asarray(codec.decode(jax.jit(codec.encode)(states), jnp.float32))
    np.testing.assert_allclose(decoded, _int8_by_numpy(states), rtol=1e-6, atol=1e-6)
    error = decoded - states
    assert _relative_rms(error, states) < 0.01
    # The channels beside the outliers, measured by themselves.
    assert 0.004 < _relative_rms(error[:, outliers:], states[:, outliers:]) < 0.01


def test_int8_is_within_half_a_step_of_every_channel():
    states, codec = _normal(4, emb_dim=256), codecs.get("int8")
    arrays = codec.encode(states)
    error = np.abs(np.asarray(codec.decode(arrays, jnp.float32)) - states)
    bound = np.broadcast_to(np.asarray(arrays["scale"])[:, None] * 0.5001, states.shape).copy()
    np.put_along_axis(bound, np.asarray(arrays["places"], np.int64), np.inf, axis=1)
    assert (error <= bound).all()
    large = np.take_along_axis(error, np.asarray(arrays["places"], np.int64), axis=1)
    assert (large <= np.abs(states).max() * 2.0**-8).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-45, 3e38])
def test_int8_holds_at_the_edges_of_float32(value):
    states = np.full((2, 16), value, np.float32)
    decoded = np.asarray(codecs.get("int8").decode(codecs.get("int8").encode(states), np.float32))
    np.testing.assert_allclose(decoded, states, rtol=0.004, atol=1e-38)


def test_int8_sorts_no_more_than_it_keeps():
    # A whole sort of every token costs a hundred times as much.
    text = jax.jit(codecs.get("int8").encode).lower(_normal(0)).compile().as_text()
    assert "TopK" in text and " sort(" not in text


def test_int8_takes_about_half_of_bfloat16():
    def size(name, emb_dim):
        specs = codecs.get(name).array_specs(emb_dim).values()
        return sum(int(np.prod(trailing)) * dtype.itemsize for trailing, dtype in specs)

    assert size("bf16", 768) == 1536 and size("int8", 768) == 804
    assert size("int8", 4096) == 4268


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_int8_is_what_a_store_gives_with_the_gradient_of_the_identity(dtype):
    codec, states = codecs.get("int8"), jnp.asarray(_normal(2, emb_dim=64), dtype)
    out, vjp = jax.vjp(jax.jit(lambda x: codecs.straight_through(codec, x)), states)
    stored = codec.decode(jax.jit(codec.encode)(states), dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, stored)
    cotangent = jnp.asarray(_normal(0, emb_dim=64), dtype)
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)


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
