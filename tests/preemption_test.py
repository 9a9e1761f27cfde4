"""SIGTERM: a flag where there is something to save, a way out where there is not."""

import signal

import pytest

from glimmer_jax.preemption import Preempted, Watcher, leave_at_sigterm


def test_sigterm_leaves_at_once_and_the_former_handler_comes_back():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="Stopped by SIGTERM"), leave_at_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_watcher_inside_decides_for_itself():
    with leave_at_sigterm(), Watcher() as watcher:
        signal.raise_signal(signal.SIGTERM)
        assert watcher.requested
