"""Codecs compared with numpy, outliers, and the straight-through gradient at the cut."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import codecs
from glimmer_jax.codecs import nearest
from glimmer_jax.partitioning import MeshConfig, make_mesh

SMALL = dataclasses.replace(codecs.get("pq"), bits=4)
D = 16
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


def test_decoding_returns_the_requested_dtype():
    arrays = codecs.get("bf16").encode(STATES)
    assert codecs.get("bf16").decode(arrays, jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(codecs.get("f32").decode({"states": STATES}, np.float32), STATES)


def test_unknown_codecs_are_rejected():
    with pytest.raises(ValueError, match=r"memory_codec.*bf16.*int3"):
        codecs.get("int3")


def _int8_by_numpy(states):
    """A reference implementation of the int8 round trip."""
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
def test_int8_error_is_below_one_percent_beside_outliers(outliers):
    states, codec = _normal(outliers), codecs.get("int8")
    decoded = np.asarray(codec.decode(jax.jit(codec.encode)(states), jnp.float32))
    np.testing.assert_allclose(decoded, _int8_by_numpy(states), rtol=1e-6, atol=1e-6)
    error = decoded - states
    assert _relative_rms(error, states) < 0.01
    # The error of the other channels alone.
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
def test_int8_handles_the_extremes_of_float32(value):
    states = np.full((2, 16), value, np.float32)
    decoded = np.asarray(codecs.get("int8").decode(codecs.get("int8").encode(states), np.float32))
    np.testing.assert_allclose(decoded, states, rtol=0.004, atol=1e-38)


def test_int8_does_not_sort_all_channels():
    # A complete sort of every token costs a hundred times as much.
    text = jax.jit(codecs.get("int8").encode).lower(_normal(0)).compile().as_text()
    assert "TopK" in text and " sort(" not in text


def test_int8_takes_about_half_of_bfloat16():
    def size(name, emb_dim):
        specs = codecs.get(name).array_specs(emb_dim).values()
        return sum(int(np.prod(trailing)) * dtype.itemsize for trailing, dtype in specs)

    assert size("bf16", 768) == 1536 and size("int8", 768) == 804
    assert size("int8", 4096) == 4268


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_int8_equals_the_store_with_identity_gradient(dtype):
    codec, states = codecs.get("int8"), jnp.asarray(_normal(2, emb_dim=64), dtype)
    out, vjp = jax.vjp(jax.jit(lambda x: codecs.straight_through(codec, x)), states)
    stored = codec.decode(jax.jit(codec.encode)(states), dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, stored)
    cotangent = jnp.asarray(_normal(0, emb_dim=64), dtype)
    np.testing.assert_array_equal(vjp(cotangent)[0], cotangent)


@pytest.mark.parametrize("jit", [False, True])
def test_straight_through_rounds_exactly_with_identity_gradient(jit):
    codec = codecs.get("bf16")

    def rounded(x):
        return codecs.straight_through(codec, x)

    # Numpy rounds to nearest even. Under jit the compiler must not remove the round trip.
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


def _codebooks(codec=SMALL, emb_dim=D, seed=0):
    rng = np.random.default_rng(seed)
    books = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in codec.codebook_specs(emb_dim).items()
    }
    books["basis"] = np.linalg.qr(books["basis"])[0]
    books["scale"] = np.exp(books["scale"])
    return books


def _states(rows=40, emb_dim=D):
    return np.random.default_rng(1).normal(size=(2, rows // 2, emb_dim)).astype(np.float32)


def _codes_by_numpy(codec, states, books):
    turned = ((states - books["mean"]) / books["scale"]) @ books["basis"]
    parts = turned.reshape(*states.shape[:-1], -1, 1, codec.channels)
    return np.square(parts - books["centroids"]).sum(-1).argmin(-1)


@pytest.mark.parametrize("jit", [False, True])
def test_pq_equals_numpy(jit):
    books, states = _codebooks(), _states()
    encode, decode = SMALL.encode, lambda a, b: SMALL.decode(a, jnp.float32, b)
    if jit:
        encode, decode = jax.jit(encode), jax.jit(decode)
    arrays = encode(states, books)
    codes = _codes_by_numpy(SMALL, states, books)
    assert arrays["codes"].dtype == np.uint8 and arrays["codes"].shape == (2, 20, 2)
    np.testing.assert_array_equal(arrays["codes"], codes)
    parts = books["centroids"][np.arange(2), codes].reshape(2, 20, D)
    wanted = (parts @ books["basis"].T) * books["scale"] + books["mean"]
    np.testing.assert_allclose(decode(arrays, books), wanted, rtol=1e-4, atol=1e-4)


def test_ties_go_to_the_first_code_and_what_is_no_number_has_a_code():
    points = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    twice = jnp.tile(points[:8], (2, 1))
    assert (nearest(points, twice) < 8).all()
    assert nearest(points[:1] * 0, jnp.zeros((8, 4))).tolist() == [0]
    assert nearest(points[:1] * np.nan, twice).tolist() == [15]


@pytest.mark.parametrize("emb_dim", [128, 768, 4096])
def test_pq_takes_a_sixteenth_of_bfloat16(emb_dim):
    ((trailing, dtype),) = codecs.get("pq").array_specs(emb_dim).values()
    assert dtype == np.uint8 and np.prod(trailing) * 16 == 2 * emb_dim
    specs = codecs.get("pq").codebook_specs(emb_dim)
    assert specs["centroids"] == (*trailing, 256, 8) and specs["frequencies"] == (*trailing, 256)


def test_pq_rejects_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="'pq'.*emb_dim.*8.*12"):
        codecs.get("pq").array_specs(12)


def test_straight_through_passes_gradients_and_counts_assignments():
    books, states = _codebooks(), _states()
    counted = np.arange(40).reshape(2, 20) % 3 > 0

    def rounded(states, learned, counted=counted):
        return codecs.straight_through(SMALL, states, {**books, **learned}, counted)

    learned = {name: books[name] for name in ("centroids", "frequencies")}
    out, vjp = jax.vjp(jax.jit(rounded), states, learned)
    arrays = SMALL.encode(states, books)
    stored = jax.jit(lambda a, b: SMALL.decode(a, jnp.float32, b))(arrays, books)
    np.testing.assert_allclose(out, stored, rtol=1e-5, atol=1e-5)
    cotangent = np.random.default_rng(2).normal(size=states.shape).astype(np.float32)
    to_states, sums = vjp(cotangent)
    np.testing.assert_array_equal(to_states, cotangent)
    turned = ((states - books["mean"]) / books["scale"]) @ books["basis"]
    codes = _codes_by_numpy(SMALL, states, books)
    errors, counts = np.zeros_like(books["centroids"]), np.zeros_like(books["frequencies"])
    for part, code in zip(turned[counted].reshape(-1, 2, 8), codes[counted], strict=True):
        for group in range(2):
            errors[group, code[group]] += books["centroids"][group, code[group]] - part[group]
            counts[group, code[group]] += 1
    np.testing.assert_allclose(sums["centroids"], errors, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(sums["frequencies"], -counts)
    # Codebooks that do not follow have no gradient.
    _, vjp = jax.vjp(jax.jit(lambda *x: rounded(*x, counted=None)), states, learned)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(vjp(cotangent)[1]))


def test_many_points_are_searched_in_blocks(monkeypatch):
    monkeypatch.setattr(codecs, "_POINT_BLOCK", 16)
    rng = np.random.default_rng(0)
    points, centroids = (rng.normal(size=(n, 4)).astype(np.float32) for n in (16 * 3 + 5, 40))
    wanted = np.square(points[:, None] - centroids).sum(-1).argmin(-1)
    np.testing.assert_array_equal(jax.jit(nearest)(points, centroids), wanted)
    # No array of all points and all centroids.
    sizes = re.findall(
        r"f32\[(\d+),(\d+)\]", jax.jit(nearest).lower(points, centroids).as_text("hlo")
    )
    assert max(int(a) * int(b) for a, b in sizes) < 53 * 40
    # Each device in blocks of its own; the last block of each is padded.
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    spread = jax.shard_map(
        nearest, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
    )
    np.testing.assert_array_equal(jax.jit(spread)(points[:52], centroids), wanted[:52])
