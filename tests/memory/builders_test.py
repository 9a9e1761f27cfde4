"""Many builders, one store: the bytes of one builder, whoever comes first."""

import concurrent.futures
import time

import pytest

from glimmer_jax.memory.builders import Builders
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.preemption import Preempted


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


def test_the_first_builder_waits_for_the_others_and_goes_on_later(tiny, tmp_path):
    path = tmp_path / "s"
    with pytest.raises(Preempted, match="2 shards of other builders are missing, the first 000001"):
        tiny.build_tiny(path, builders=Builders(0, 2, wait_seconds=0.0))
    tiny.build_tiny(path, builders=Builders(1, 2))
    report = tiny.build_tiny(path, builders=Builders(0, 2))
    assert (report.built, report.skipped) == (0, 2) and report.manifest.num_passages == 23


def test_shards_of_another_build_are_refused(tiny, tmp_path):
    tiny.build_tiny(tmp_path / "s", builders=Builders(1, 2), encoder_fingerprint="sha256:e2")
    with pytest.raises(ValueError, match="000001/shard.json belongs to another build: encoder"):
        tiny.build_tiny(tmp_path / "s", builders=Builders(0, 2))


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_builders_count_from_zero(index, count):
    with pytest.raises(ValueError, match="from 0 to BUILDER_COUNT - 1; got BUILDER_INDEX="):
        Builders(index, count)
