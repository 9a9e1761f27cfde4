"""What goes wrong with disks, folders and corpora: a right result, or a message that says what to do."""

import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.memory import encoding, manifest
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.manifest import DamagedStore, Manifest
from glimmer_jax.memory.store import MemoryStore

pytestmark = pytest.mark.fault


def _start(path, die_at="never"):
    script = pathlib.Path(__file__).parent / "tiny_memory.py"
    root = str(pathlib.Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(script), str(path), die_at],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_at_a_random_moment_it_ends_with_the_same_bytes(
    tiny, tiny_store, tmp_path, folder_bytes
):
    path = tmp_path / "s"
    with _start(path) as process:
        while not (path / "build.lock").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    tiny.build_tiny(path)
    assert folder_bytes(path) == folder_bytes(tiny_store)


def test_a_full_disk_is_reported_and_the_build_resumes_with_space(
    tiny, tiny_store, tmp_path, folder_bytes
):
    path = tmp_path / "s"
    with _start(path, "disk_full") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "permissions and free space, and run the same command again" in said
    assert not (path / "manifest.json").exists()
    tiny.build_tiny(path)
    assert folder_bytes(path) == folder_bytes(tiny_store)


def test_stray_files_are_ignored(tiny, copied_store, tiny_store):
    (copied_store / "notes.txt").write_text("mine")
    (copied_store / "shards" / "000001" / "states" / "c" / "9").mkdir(parents=True)
    (copied_store / "shards" / "000001" / "states" / "c" / "9" / "0").write_bytes(b"x" * 99)
    shutil.copytree(copied_store / "shards" / "000000", copied_store / "shards" / "000077")
    store = MemoryStore.open(copied_store)
    assert verify(store.path) == [] and len(store) == 23
    mine, _ = store.read(np.arange(23), 12)
    theirs, _ = MemoryStore.open(tiny_store).read(np.arange(23), 12)
    np.testing.assert_array_equal(mine["states"].view(np.uint16), theirs["states"].view(np.uint16))
    assert tiny.build_tiny(copied_store).built == 0


def test_a_shard_that_is_another_one_is_found(copied_store, tiny_store):
    shards = copied_store / "shards"
    shutil.rmtree(shards / "000001")
    (shards / "000001").symlink_to(shards / "000002", target_is_directory=True)
    with pytest.raises(DamagedStore, match="Shard 000001 .*shard.json.*manifest.*--action=repair"):
        MemoryStore.open(copied_store)
    (shards / "000001").unlink()
    shutil.copytree(tiny_store / "shards" / "000001", shards / "000001")
    # One that leads to the very bytes is as good as they are.
    shutil.move(shards / "000000", copied_store.parent / "elsewhere")
    (shards / "000000").symlink_to(copied_store.parent / "elsewhere", target_is_directory=True)
    MemoryStore.open(copied_store).read(np.arange(6), 12)


@pytest.mark.parametrize("passages", [7, 10**6, 2**61])
def test_counts_that_the_index_does_not_have_take_no_memory(copied_store, passages):
    found = Manifest.from_bytes((copied_store / "manifest.json").read_bytes(), "m")
    last = dataclasses.replace(found.shards[-1], passages=passages)
    value = Manifest.of(
        found.identity,
        [*found.shards[:-1], last],
        version=1,
        passages_fingerprints=found.passages_fingerprints,
        codec_error=None,
    )
    (copied_store / "manifest.json").write_bytes(value.to_bytes())
    with pytest.raises(DamagedStore, match="Shard 000003 .*ids and offsets"):
        MemoryStore.open(copied_store)


@pytest.mark.parametrize("emb_dim", [2**20, 2**50])
def test_a_width_that_the_files_do_not_have_takes_no_memory(copied_store, emb_dim):
    found = Manifest.from_bytes((copied_store / "manifest.json").read_bytes(), "m")
    identity = dataclasses.replace(found.identity, emb_dim=emb_dim)
    value = dataclasses.replace(found, identity=identity)
    (copied_store / "manifest.json").write_bytes(value.to_bytes())
    with pytest.raises(DamagedStore, match="Shard 000000 .*states"):
        MemoryStore.open(copied_store)


def test_more_devices_than_passages(tiny, tmp_path):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=8), jax.devices()[:8])
    encode = encoding.bind_encoder(lambda _, tokens: tiny.encode_states(tokens), {}, mesh, "bf16")
    passages = tiny.TinyPassages(count=2)
    tiny.build_tiny(tmp_path / "many", passages, encode=encode, devices=8, reference=None)
    tiny.build_tiny(tmp_path / "one", passages, reference=None)
    for name in ("many", "one"):
        assert verify(tmp_path / name) == []
    read = [MemoryStore.open(tmp_path / name).read(np.arange(2), 12) for name in ("many", "one")]
    np.testing.assert_array_equal(*(memory["states"].view(np.uint16) for memory, _ in read))


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_every_codec_builds_on_every_device(tiny, tmp_path, codec):
    """int8 once aborted in the compiler here, on eight devices without optimisation."""
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=8), jax.devices()[:8])
    encode = encoding.bind_encoder(lambda _, tokens: tiny.encode_states(tokens), {}, mesh, codec)
    tiny.build_tiny(tmp_path / "s", encode=encode, devices=8, codec=codec, reference=None)
    assert verify(tmp_path / "s") == []


def test_a_lock_of_a_dead_process_is_taken_over(tiny, tmp_path, tiny_store, folder_bytes):
    path = tmp_path / "s"
    with _start(path, "encode") as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and (path / manifest.LOCK).exists()
    tiny.build_tiny(path)
    assert folder_bytes(path) == folder_bytes(tiny_store)
