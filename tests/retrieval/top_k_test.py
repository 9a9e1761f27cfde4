"""Exact search against numpy: ties, masks, odd sizes, and the same bits from both homes."""

import jax
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.retrieval import top_k
from glimmer_jax.retrieval.top_k import Search


class Vectors:
    """An index in RAM, which counts how often it is read."""

    def __init__(self, vectors):
        self.vectors = vectors.astype(np.float16)
        self.vector_dim = vectors.shape[1]
        self.reads = 0

    def __len__(self):
        return len(self.vectors)

    def read(self, start, stop):
        self.reads += 1
        return self.vectors[start:stop]


@pytest.fixture(scope="module", autouse=True)
def few_questions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "QUESTIONS", 16)
        yield


@pytest.fixture(scope="module")
def mesh():
    config = partitioning.MeshConfig(data=2, fsdp=2, model=2)
    return partitioning.make_mesh(config, jax.devices())


def brute_force(questions, vectors, k, allowed=None):
    scores = questions @ vectors.astype(np.float32).T
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    return best, np.where(np.isneginf(best), -1, order)


def both(vectors, mesh, rows):
    """The index on the devices, and the same from disk in blocks."""
    searches = [Search(Vectors(vectors), mesh, size, rows) for size in (10**9, 0)]
    assert [search.on_mesh for search in searches] == [True, False]
    return searches


@pytest.mark.parametrize(("count", "rows", "k"), [(300, 7, 5), (37, 7, 50), (5, 64, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_results_equal_numpys_with_ties_in_the_order_of_passages(mesh, count, rows, k, masked):
    random = np.random.default_rng(count)
    # Small integers: every product is exact, and most scores are shared.
    vectors = random.integers(-2, 3, (count, 4))
    questions = random.integers(-2, 3, (20, 4)).astype(np.float32)
    allowed = random.random(count) < 0.6 if masked else None
    want_scores, want_rows = brute_force(questions, vectors, k, allowed)
    ties = want_scores[:, 1:] == want_scores[:, :-1]
    assert (ties & np.isfinite(want_scores[:, 1:])).any()
    for search in both(vectors, mesh, rows):
        scores, found = search(questions, k, allowed)
        np.testing.assert_array_equal(scores[:, :count], want_scores)
        np.testing.assert_array_equal(found[:, :count], want_rows)
        assert (found[:, count:] == -1).all() and scores.shape == (20, k)


def test_both_homes_give_the_same_bits_on_any_mesh_size(mesh):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(400, 12))
    questions = random.normal(size=(40, 12)).astype(np.float32)
    on_mesh, from_disk = (search(questions, 9) for search in both(vectors, mesh, 16))
    np.testing.assert_array_equal(on_mesh[0], from_disk[0])
    np.testing.assert_array_equal(on_mesh[1], from_disk[1])
    scores, rows = brute_force(questions, vectors.astype(np.float16), 9)
    np.testing.assert_array_equal(on_mesh[1], rows)
    np.testing.assert_allclose(on_mesh[0], scores, rtol=1e-5)
    one = partitioning.make_mesh(partitioning.MeshConfig(), jax.devices()[:1])
    np.testing.assert_array_equal(Search(Vectors(vectors), one, 0, 64)(questions, 9)[1], rows)


def test_one_pass_from_disk_serves_many_questions(mesh, monkeypatch):
    on_mesh, from_disk = both(np.ones((64, 2)), mesh, 4)
    assert on_mesh.index.reads == 16
    for search in (on_mesh, from_disk):
        assert search(np.ones((40, 2), np.float32), 2)[1].tolist() == [[0, 1]] * 40
    assert (on_mesh.index.reads, from_disk.index.reads) == (16, 16)
    monkeypatch.setattr(top_k, "PASS_QUESTIONS", 16)
    assert from_disk(np.ones((40, 2), np.float32), 2)[0].shape == (40, 2)
    assert from_disk.index.reads == 16 + 3 * 16


def test_programs_are_compiled_once_for_any_number_of_questions(mesh):
    search = Search(Vectors(np.ones((64, 2))), mesh, 0, 4)
    search(np.ones((3, 2), np.float32), 2)
    before = top_k._step._cache_size(), top_k._merge._cache_size()
    search(np.ones((50, 2), np.float32), 2)
    assert (top_k._step._cache_size(), top_k._merge._cache_size()) == before
    assert search(np.zeros((0, 2), np.float32), 2)[0].shape == (0, 2)


def test_shapes_and_k_out_of_range_are_rejected(mesh):
    search = Search(Vectors(np.ones((6, 2))), mesh, 0)
    for questions, k, allowed in [
        (np.ones((1, 2)), 0, None),
        (np.ones((1, 3)), 1, None),
        (np.ones((1, 2)), 1, np.ones(5, bool)),
    ]:
        with pytest.raises(ValueError, match=r"NUM_PASSAGES must be at least 1.*got k="):
            search(questions, k, allowed)
