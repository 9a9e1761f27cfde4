"""SIGTERM: a flag where there is something to save, a way out where there is not."""

import ctypes
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from glimmer_jax.runtime.preemption import (
    Interrupted,
    Preempted,
    Watcher,
    leave_at_sigterm,
    stop_together,
    stoppable,
)


def test_sigterm_leaves_at_once_and_the_former_handler_comes_back():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="Stopped by SIGTERM"), leave_at_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_watcher_inside_decides_for_itself():
    with leave_at_sigterm(), Watcher() as watcher:
        signal.raise_signal(signal.SIGTERM)
        assert watcher.requested


def test_a_handler_that_python_did_not_set_comes_back():
    libc, ignore = ctypes.CDLL(None), 1
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    former = libc.signal(signal.SIGTERM, ignore)
    try:
        with Watcher():
            pass
    finally:
        assert libc.signal(signal.SIGTERM, former) == ignore


def test_work_of_a_job_is_given_up_at_one_call_and_the_loop_around_it_hears_of_it(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    calls = []
    monkeypatch.setattr(
        multihost_utils,
        "reached_preemption_sync_point",
        lambda n: calls.append(n) or n == calls[0] + 3,
    )
    with Watcher(together=True) as watcher:
        assert not watcher.requested_at()
        watcher.poll()
        watcher.poll()
        with pytest.raises(Interrupted):
            watcher.poll()
        # JAX would say no at the next number.
        assert watcher.requested_at() and len(calls) == 4


def test_all_loops_of_a_job_count_as_one(monkeypatch):
    polled = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda n: polled.append(n) or n == stop
    )
    stop = None
    for _ in range(2):
        assert list(stoppable(range(5), every=2)) == [0, 1, 2, 3, 4]
        stop_together()
    assert polled == list(range(polled[0], polled[0] + 8))
    stop = polled[-1] + 2
    with pytest.raises(Preempted, match="Run the same command again"):
        list(stoppable(range(9), every=4))
