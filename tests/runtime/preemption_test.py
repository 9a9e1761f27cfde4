"""The stop signal: a flag that loops poll, and a watchdog for work that cannot poll."""

import ctypes
import signal
import subprocess
import sys
import time

import jax
import pytest
from jax.experimental import multihost_utils

from glimmer_jax.runtime.preemption import STOP, StopRequested, StopSignal
from tests.children import running


def test_sigterm_sets_a_flag_and_the_previous_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with STOP.installed():
        with STOP.installed():  # Nested contexts do nothing.
            signal.raise_signal(signal.SIGTERM)
        assert STOP.requested and STOP.exit_code == 42
        with pytest.raises(StopRequested, match="SIGTERM.*same command"):
            STOP.poll()
        with pytest.raises(StopRequested, match="saved"):
            STOP.poll("saved")
    assert signal.getsignal(signal.SIGTERM) is before and not STOP.requested


def test_work_that_must_finish_defers_the_stop():
    with STOP.installed():
        signal.raise_signal(signal.SIGTERM)
        with STOP.deferred():
            STOP.poll()
            STOP.poll_together()
            assert STOP.requested and not STOP.agreed()
        with pytest.raises(StopRequested):
            STOP.poll_together()


def test_ctrl_c_has_an_exit_code_of_its_own():
    with STOP.installed():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StopRequested, match="SIGINT"):
            STOP.poll()
        assert STOP.exit_code == 130


@pytest.mark.parametrize(
    "order", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_a_preemption_is_restarted_whatever_else_arrives(order):
    with STOP.installed():
        for number in order:
            signal.raise_signal(number)
        assert STOP.exit_code == 42


def test_a_closed_terminal_stops_the_work_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with STOP.installed():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(StopRequested, match="SIGHUP"):
                STOP.poll()
            assert STOP.exit_code == 42
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with STOP.installed():
            signal.raise_signal(signal.SIGHUP)
            STOP.poll()
            assert not STOP.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_native_handler_is_called_and_comes_back():
    libc = ctypes.CDLL(None)
    called = []
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(called.append)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    address = ctypes.cast(handler, ctypes.c_void_p).value
    before = libc.signal(signal.SIGTERM, address)
    try:
        stop = StopSignal()
        with stop.installed():
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested and called == [signal.SIGTERM]
    finally:
        assert libc.signal(signal.SIGTERM, before) == address


def test_code_that_catches_exceptions_lets_a_stop_through():
    def poll_in_library():
        try:
            STOP.poll()
        except Exception:  # noqa: BLE001
            pytest.fail("swallowed")

    STOP.request()
    with pytest.raises(StopRequested):
        poll_in_library()


def test_processes_of_a_job_stop_at_the_same_call(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    steps = []
    monkeypatch.setattr(
        multihost_utils,
        "reached_preemption_sync_point",
        lambda step: steps.append(step) or step == 3,
    )
    stop = StopSignal()
    assert list(stop.polling(range(4), every=2)) == [0, 1, 2, 3]
    assert not stop.agreed()
    with pytest.raises(StopRequested):
        stop.poll_together()
    # JAX would say no at the next step.
    assert stop.agreed() and steps == [0, 1, 2, 3]


SCRIPT = """
import os, signal, sys, threading, time
from glimmer_jax.runtime.preemption import STOP, StopRequested
STOP.install()
print("ready", flush=True)
{body}
"""


def ended(body, *signals, pause=0.0):
    """Exit code and stderr of a script that gets these signals."""
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with running(command, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            time.sleep(pause)
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


# A main thread that runs native code: no Python handler runs before it returns.
NATIVE = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_native_code_that_never_polls_ends_after_the_grace(number, code):
    returned, errors = ended(f"with STOP.grace(0.2):\n    {NATIVE}", number)
    assert returned == code
    assert f"Stopped at once by {number.name}" in errors and "Traceback" not in errors


def test_saving_after_a_poll_may_take_longer_than_the_grace():
    body = """
with STOP.grace(0.5):
    while True:
        time.sleep(0.05)
        try:
            STOP.poll()
        except StopRequested:
            time.sleep(2)  # Saves.
            sys.exit(7)
"""
    assert ended(body, signal.SIGTERM)[0] == 7


def test_a_second_signal_exits_immediately_even_while_saving():
    body = "while not STOP.requested: time.sleep(0.01)\n" + NATIVE
    returned, errors = ended(body, signal.SIGTERM, signal.SIGTERM, pause=1.5)
    assert returned == 42 and "second signal" in errors


def test_one_request_delivered_twice_counts_once():
    body = "while not STOP.requested: time.sleep(0.01)\ntime.sleep(1)\nsys.exit(7)"
    assert ended(body, signal.SIGTERM, signal.SIGTERM, pause=0.05)[0] == 7


def test_a_signal_after_the_work_keeps_its_exit_code():
    body = f"STOP.finish(0)\nwith STOP.grace(0.2):\n    {NATIVE}"
    assert ended(body, signal.SIGTERM) == (0, "")
