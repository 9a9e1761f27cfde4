"""Many builders, one store: the bytes of one builder, whoever comes first."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest

from glimmer_jax.memory import edit, manifest
from glimmer_jax.memory.build_plan import Builders
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import StopRequested
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock


@pytest.mark.parametrize("count", [2, 3, 6])
def test_many_builders_make_the_bytes_of_one(tiny, tiny_store, tmp_path, folder_bytes, count):
    path = tmp_path / "s"
    reports = [tiny.build_tiny(path, builders=Builders(index, count)) for index in range(1, count)]
    assert all(report.manifest is None for report in reports)
    with pytest.raises(ValueError, match="No finished memory store"):
        MemoryStore.open(path)
    last = tiny.build_tiny(path, builders=Builders(0, count))
    assert last.built + sum(report.built for report in reports) == 4
    assert folder_bytes(path) == folder_bytes(tiny_store)


def test_builders_at_the_same_time(tiny, tiny_store, tmp_path, folder_bytes, monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda _: sleep(0.01))
    path = tmp_path / "s"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: tiny.build_tiny(path, builders=Builders(i, 3)), range(3)))
    assert folder_bytes(path) == folder_bytes(tiny_store)


def test_the_first_builder_waits_for_the_others_and_resumes(tiny, tmp_path):
    path = tmp_path / "s"
    with pytest.raises(StopRequested, match="2 shards .*missing.* 000001"):
        tiny.build_tiny(path, builders=Builders(0, 2, wait_seconds=0.0))
    tiny.build_tiny(path, builders=Builders(1, 2))
    report = tiny.build_tiny(path, builders=Builders(0, 2))
    assert (report.built, report.skipped) == (0, 2) and report.manifest.num_passages == 23


def test_shards_of_another_build_are_rejected(tiny, tmp_path):
    tiny.build_tiny(tmp_path / "s", builders=Builders(1, 2), encoder_fingerprint="sha256:e2")
    with pytest.raises(ValueError, match="000001/shard.json .*another build: encoder"):
        tiny.build_tiny(tmp_path / "s", builders=Builders(0, 2))


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_builders_count_from_zero(index, count):
    with pytest.raises(ValueError, match="from 0 to BUILDER_COUNT - 1; got BUILDER_INDEX="):
        Builders(index, count)


def test_builders_of_two_corpora_make_no_store(tiny, tmp_path):
    path, other = tmp_path / "s", tiny.TinyPassages()
    other.all_tokens[7] = other.all_tokens[7] + 1  # of shard 1
    tiny.build_tiny(path, other, builders=Builders(1, 2))
    with pytest.raises(ValueError, match="000001/shard.json .*other passages"):
        tiny.build_tiny(path, builders=Builders(0, 2))
    assert not (path / manifest.MANIFEST).exists()


@pytest.mark.parametrize("first, second", [((0, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 3), (1, 2))])
def test_builders_of_another_number_are_rejected_while_one_lives(tiny, tmp_path, first, second):
    path = tmp_path / "s"
    with Builders(*first).lock(folder.open_folder(path), manifest.LOCK):
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on"):
            tiny.build_tiny(path, builders=Builders(*second, wait_seconds=0.0))
        assert not list(path.glob("shards/*"))
    # Once they are gone, any number of builders may resume.
    for index in reversed(range(second[1])):
        tiny.build_tiny(path, builders=Builders(index, second[1]))
    assert MemoryStore.open(path).manifest.num_passages == 23


@pytest.mark.fault
def test_shards_of_dead_builders_do_not_block_another_count(
    tiny, tiny_store, tmp_path, folder_bytes
):
    path = tmp_path / "s"
    dead = f"""
import os, signal, sys
from glimmer_jax.storage import folder
from glimmer_jax.memory.build_plan import Builders
with Builders(1, 2).lock(folder.open_folder({str(path)!r}), "build.lock"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", dead]).returncode == -signal.SIGKILL
    assert list(path.glob("builders/*/build.lock"))
    for index in (2, 1, 0):
        tiny.build_tiny(path, builders=Builders(index, 3))
    assert folder_bytes(path) == folder_bytes(tiny_store)


@pytest.mark.fault
@pytest.mark.parametrize("job", ["build", "append", "withdraw"])
def test_a_builder_that_lost_its_lock_writes_nothing(tiny, tmp_path, monkeypatch, job):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    if job != "build":
        tiny.build_tiny(path, tiny.part(range(9)))
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}

    def lost(self):
        raise ValueError("build.lock was taken over by another process")

    monkeypatch.setattr(WriterLock, "check", lost)
    work = {
        "build": lambda: tiny.build_tiny(path),
        "append": lambda: tiny.append_tiny(path, whole),
        "withdraw": lambda: edit.withdraw(path, whole.ids[[3]].tolist()),
    }
    with pytest.raises(ValueError, match="was taken over by"):
        work[job]()
    assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == before
