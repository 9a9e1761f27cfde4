"""Product quantisation against numpy, beside outliers, and with its gradients."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import codecs
from glimmer_jax.codecs import nearest
from glimmer_jax.memory import codebooks
from glimmer_jax.partitioning import MeshConfig, make_mesh

SMALL = dataclasses.replace(codecs.get("pq"), bits=4)
D = 16


def _books(codec=SMALL, emb_dim=D, seed=0):
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
def test_codes_and_states_are_those_of_numpy(jit):
    books, states = _books(), _states()
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


def test_large_books_are_searched_in_blocks():
    rng = np.random.default_rng(0)
    points, centroids = (rng.normal(size=(n, 4)).astype(np.float32) for n in (30, 3 * 4096))
    wanted = np.square(points[:, None] - centroids).sum(-1).argmin(-1)
    np.testing.assert_array_equal(jax.jit(nearest)(points, centroids), wanted)
    # Of equals the first, in a block and between blocks.
    twice = jnp.tile(centroids[:4096], (2, 1))
    assert (nearest(points, twice) < 4096).all()
    assert nearest(points[:1] * 0, jnp.zeros((8, 4))).tolist() == [0]


@pytest.mark.parametrize(("name", "kind"), [("pq", np.uint8), ("pq16", np.uint16)])
@pytest.mark.parametrize("emb_dim", [128, 768, 4096])
def test_memory_is_a_sixteenth_of_bfloat16(name, kind, emb_dim):
    ((trailing, dtype),) = codecs.get(name).array_specs(emb_dim).values()
    assert dtype == kind and np.prod(trailing) * dtype.itemsize * 16 == 2 * emb_dim
    assert codecs.get(name).codebook_specs(emb_dim)["centroids"] == (
        *trailing,
        2 ** (8 * dtype.itemsize),
        8 * dtype.itemsize,
    )


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match="'pq' cuts a token into subspaces of 8 channels.*emb_dim=12"
    ):
        codecs.get("pq").array_specs(12)


def test_straight_through_has_the_gradient_of_the_identity_and_of_the_chosen_centroids():
    books, states = _books(), _states()

    def rounded(states, centroids):
        return codecs.straight_through(SMALL, states, {**books, "centroids": centroids})

    out, vjp = jax.vjp(jax.jit(rounded), states, books["centroids"])
    arrays = SMALL.encode(states, books)
    stored = jax.jit(lambda a, b: SMALL.decode(a, jnp.float32, b))(arrays, books)
    np.testing.assert_allclose(out, stored, rtol=1e-5, atol=1e-5)
    cotangent = np.random.default_rng(2).normal(size=states.shape).astype(np.float32)
    to_states, to_centroids = vjp(cotangent)
    np.testing.assert_array_equal(to_states, cotangent)
    parts = ((cotangent * books["scale"]) @ books["basis"]).reshape(-1, 2, 8)
    wanted = np.zeros_like(books["centroids"])
    for part, codes in zip(parts, np.asarray(arrays["codes"]).reshape(-1, 2), strict=True):
        wanted[np.arange(2), codes] += part
    np.testing.assert_allclose(to_centroids, wanted, rtol=1e-4, atol=1e-4)


def test_many_points_are_searched_in_blocks(monkeypatch):
    monkeypatch.setattr(codecs, "_POINTS", 16)
    rng = np.random.default_rng(0)
    points, centroids = (rng.normal(size=(n, 4)).astype(np.float32) for n in (16 * 3 + 5, 40))
    wanted = np.square(points[:, None] - centroids).sum(-1).argmin(-1)
    np.testing.assert_array_equal(jax.jit(nearest)(points, centroids), wanted)
    # No array of all points and all centroids.
    sizes = re.findall(
        r"f32\[(\d+),(\d+)\]", jax.jit(nearest).lower(points, centroids).as_text("hlo")
    )
    assert max(int(a) * int(b) for a, b in sizes) < 53 * 40
    # Each device in blocks of its own; the last block of each is filled up.
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    spread = jax.shard_map(
        nearest, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
    )
    np.testing.assert_array_equal(jax.jit(spread)(points[:52], centroids), wanted[:52])


def test_sixteen_bits_of_sixteen_channels_as_in_the_paper():
    codec = codecs.get("pq16")
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2**16 + 300, 16)).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    books = codebooks.learn(codec, states, mesh, iterations=0)  # drawn states: k-means takes long
    assert books["centroids"].shape == (1, 2**16, 16)
    arrays = codec.encode(states[-100:], books)
    assert arrays["codes"].dtype == np.uint16 and arrays["codes"].shape == (100, 1)
    assert arrays["codes"].max() > 255
    # As many bytes a token as 8-bit codes of 8 channels, and less is lost of states that it has not seen.
    unseen = rng.normal(size=(200, 16)).astype(np.float32)
    small = codecs.get("pq")
    others = codebooks.learn(small, states[:4096], mesh, iterations=10)
    lost = codebooks.relative_error(codec, books, unseen)
    assert lost < codebooks.relative_error(small, others, unseen)
    assert codec.encode_cost(768) == (2**16 + 768) * 768
