"""Attacks on a finished store: reading raises a clear error or returns the bytes that were built."""

import jax
import numpy as np
import pytest

from glimmer_jax.memory import encoding
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.manifest import DamagedStore
from glimmer_jax.memory.store import MemoryStore
from tests import damage

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module", params=["bf16", "int8"])
def stores(request, tmp_path_factory):
    """(a store of four shards, one of the same passages and settings with other states)."""
    import tiny_memory

    folder = tmp_path_factory.mktemp("stores")
    for name, shift in (("now", 0), ("older", 1)):

        @jax.jit
        def encode(tokens, shift=shift):
            states = tiny_memory.encode_states(tokens + shift)
            return encoding.encode_states(request.param, states)

        tiny_memory.build_tiny(folder / name, encode=encode, codec=request.param, reference=None)
    return folder / "now", folder / "older"


def _content(path):
    store = MemoryStore.open(path, "sha256:e1", "sha256:v1", cache_bytes=0)
    arrays, lengths = store.read(np.arange(len(store)), 12)
    titles = [store.titles(entry) for entry in store.manifest.shards]
    every = [store.ids, lengths, store.digests(), *arrays.values()]
    return titles, store.rows(store.ids).tolist(), [array.tobytes() for array in every]


def _check_attacks(stores, seed, count):
    path, older = stores
    intact = _content(path)
    raised = harmless = 0
    for attack in damage.attacks(path, seed=seed, count=count, older=older):
        try:
            content = _content(path)
        except ValueError as error:
            message = str(error)
            assert any(
                fact in message for fact in ("shards/", "Shard ", "manifest.json", "codec")
            ), (attack, message)
            raised += 1
        else:
            assert content == intact, attack
            harmless += 1
    # Metadata of zarr are not read, and some attacks hit nothing else.
    assert raised > count // 4
    assert _content(path) == intact


def test_a_sample_of_attacks_is_never_silent(stores):
    _check_attacks(stores, seed=0, count=42)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_attacks_are_never_silent(stores, seed):
    _check_attacks(stores, seed, count=140)


@pytest.mark.parametrize("kind", ["older_file", "older_folder", "swap_files", "copy_folder"])
def test_files_of_another_shard_or_build_are_never_read(stores, kind):
    path, older = stores
    intact = _content(path)
    for attack in damage.attacks(path, seed=3, count=10, older=older, kinds=[kind]):
        try:
            assert _content(path) == intact, attack
        except DamagedStore:
            assert verify(path) if (path / "manifest.json").exists() else True


def test_an_array_file_of_another_build_names_the_array_and_its_shard(stores):
    path, older = stores
    name = "shards/000002/" + ("states" if (path / "shards/000002/states").exists() else "codes")
    file = path / name / "c" / "0" / "0"
    before = file.read_bytes()
    file.write_bytes((older / name / "c" / "0" / "0").read_bytes())
    store = MemoryStore.open(path)
    store.read(np.arange(12), 12)
    with pytest.raises(DamagedStore, match=r"Shard 000002 .*seal.*action=repair"):
        store.read(np.array([13]), 12)
    file.write_bytes(before)


def test_metadata_of_zarr_cannot_change_what_is_read(stores):
    path, _ = stores
    intact = _content(path)
    for attack in damage.attacks(path, seed=4, count=30, kinds=["hostile_json"]):
        try:
            assert _content(path) == intact, attack
        except ValueError:
            # Manifest and records are protected by checksums.
            assert "zarr.json, " not in attack
