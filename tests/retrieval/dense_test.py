"""The index of a job of many processes: where one of them is asked to stop, all of them stop."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from glimmer_jax.memory import versions
from glimmer_jax.retrieval import dense
from glimmer_jax.runtime.preemption import StopRequested


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Makes the index as one of two; told are what becomes of it here, and what others say."""

    def make(build, others):
        told = []
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(dense, "build_index", build)
        monkeypatch.setattr(
            multihost_utils,
            "process_allgather",
            lambda mine: told.append(bool(mine)) or np.array([mine, others]),
        )
        return told, lambda: dense._finished_index(None, None, str(tmp_path), 3)

    return make


def asked_to_stop(*args, **kwargs):
    raise StopRequested("shards .*missing")


def test_all_go_on_or_none(job):
    told, made = job(lambda *args, **kwargs: "index", others=False)
    assert made() == "index" and told == [False]
    told, made = job(lambda *args, **kwargs: "index", others=True)
    with pytest.raises(StopRequested, match="when the index was finished"):
        made()


def test_a_stopped_process_stops_the_others(job, tmp_path, monkeypatch):
    told, made = job(asked_to_stop, others=False)
    with pytest.raises(StopRequested, match="shards .*missing"):
        made()
    assert told == []
    # The others have found the index finished.
    monkeypatch.setattr(versions, "is_finished", lambda kvstore: True)
    with pytest.raises(StopRequested, match="when the index was finished"):
        made()
    assert told == [True]
