"""The load generator against a server without a model."""

import asyncio
import logging
import os

import pytest

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("starlette")

from benchmarks import serve_load
from tests.server.fake_engine import serving


@pytest.fixture
def url():
    with serving(seconds=0.02, max_queue=4) as address:
        address = address.rstrip("/")
        yield address


def test_every_request_of_a_closed_loop_is_counted(url):
    found = asyncio.run(serve_load.closed_loop(url, ["red", "blue"], clients=2, count=10))
    assert found["requests"] == 10 and found["statuses"] == {200: 10}
    assert 20 < found["p50_ms"] <= found["p99_ms"]


def test_an_overloaded_server_rejects_and_the_report_counts_it(url):
    found = asyncio.run(serve_load.open_loop(url, ["red"], rate=1000, seconds=0.3))
    assert set(found["statuses"]) == {200, 429}
    assert found["answered_per_s"] < 300 and found["rejected"]["p50_ms"] > 0


def test_killed_clients_leave_nothing_behind(url, monkeypatch, caplog):
    monkeypatch.setattr(serve_load, "KILLED_ROUNDS", 3)
    with caplog.at_level(logging.ERROR):
        found = serve_load.killed_clients(url, os.getpid(), ["red", "blue"])
    assert set(found["served_beside"]) <= {200, 429}
    assert found["waiting"] == 0
    assert found["after"]["descriptors"] <= found["before"]["descriptors"]
    assert not caplog.records
