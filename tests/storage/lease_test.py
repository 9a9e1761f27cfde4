"""The writer's lock: refused while its holder lives, taken over soon after it is dead."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tensorstore as ts

from glimmer_jax.runtime.preemption import StopRequested
from glimmer_jax.storage import lease
from glimmer_jax.storage.errors import StorageError
from glimmer_jax.storage.lease import WriterLock
from tests.damage import SPECIAL_FILES

ROOT = pathlib.Path(__file__).parents[1]
NAME = "test.lock"
LEASE = 1.2
HOLDER = {"pid": 7, "host": "h", "since": "t", "lease_seconds": 1.0}
HOLD = """
import sys, time
import tensorstore as ts
from glimmer_jax.storage.lease import WriterLock
kvstore = ts.KvStore.open({"driver": "file", "path": sys.argv[1] + "/"}).result()
with WriterLock(kvstore, "test.lock", float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def folder(path):
    return ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()


def locked(path):
    return WriterLock(folder(path), NAME, LEASE)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(LEASE)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(monkeypatch):
    """From now on this process seems to run on another host."""
    monkeypatch.setattr(lease, "_here", lambda: {"host": "elsewhere", "machine": "m"})


def test_held_once_and_gone_afterwards(tmp_path):
    message = f"being written by process {os.getpid()} on .* since .*One writer at a time"
    with locked(tmp_path) as held:
        held.check()
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
    assert not (tmp_path / NAME).exists()
    with locked(tmp_path):
        pass


def rewritten(path, **fields):
    """Rewrites the lock file with other fields, as its holder would."""
    file = path / NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.fault
@pytest.mark.parametrize("ends", [True, False])
def test_a_restarted_job_waits_for_the_end_of_its_earlier_attempt(tmp_path, monkeypatch, ends):
    monkeypatch.setattr(lease, "command", lambda: "ours")
    monkeypatch.setattr(lease, "RESTART_SECONDS", 2 * LEASE)
    monkeypatch.setattr(lease, "LEASE_SECONDS", LEASE)
    (tmp_path / NAME).write_text(json.dumps({**HOLDER, "lease_seconds": LEASE, "command": "ours"}))
    beats = iter(range(1000))
    until = time.monotonic() + (LEASE / 2 if ends else 60)
    poll = lease.STOP.poll

    def renew():
        poll()
        if time.monotonic() < until:
            rewritten(tmp_path, beat=next(beats))

    monkeypatch.setattr(lease.STOP, "poll", renew)
    begun = time.monotonic()
    if ends:
        with locked(tmp_path):
            assert time.monotonic() - begun > LEASE
    else:
        with pytest.raises(StopRequested, match="process 7 on h .*attempt of this command"):
            locked(tmp_path).__enter__()
        assert 2 * LEASE < time.monotonic() - begun < 4 * LEASE
        # A holder of another command is rejected at its next renewal.
        rewritten(tmp_path, command="theirs")
        begun = time.monotonic()
        with pytest.raises(ValueError, match="One writer at a time"):
            locked(tmp_path).__enter__()
        assert time.monotonic() - begun < LEASE


@pytest.mark.fault
def test_a_living_holder_elsewhere_is_noticed_by_its_next_renewal(tmp_path, holder, monkeypatch):
    elsewhere(monkeypatch)
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"written by process {holder.pid} on"), locked(tmp_path):
        pass
    assert time.monotonic() - started < LEASE


@pytest.mark.fault
def test_a_killed_holder_is_replaced_at_once_locally_else_after_a_lease(
    tmp_path, holder, monkeypatch
):
    os.kill(holder.pid, signal.SIGKILL)
    # Not reaped: it stays in the process table as a zombie.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    left = (tmp_path / NAME).read_text()
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < LEASE / 2
    (tmp_path / NAME).write_text(left)
    elsewhere(monkeypatch)
    started = time.monotonic()
    with locked(tmp_path):
        assert LEASE / 2 < time.monotonic() - started < 3 * LEASE
        assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"


def test_a_reused_process_id_is_not_the_old_holder(tmp_path):
    holder = {**lease._here(), "pid": os.getpid(), "process_start": "other boot 1", "since": "t"}
    (tmp_path / NAME).write_text(json.dumps(holder))
    with locked(tmp_path):
        pass


@pytest.mark.fault
@pytest.mark.parametrize(
    "text, problem",
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "recursion"),
        (json.dumps({**HOLDER, "pid": "7"}), "pid is '7'"),
        (json.dumps({**HOLDER, "pid": -1}), "pid is -1"),
        (json.dumps({**HOLDER, "lease_seconds": None}), "lease_seconds is None"),
        (json.dumps({**HOLDER, "lease_seconds": 10**18}), "lease_seconds is 10000"),
        (json.dumps({"pid": 7}), "host is None, since is None"),
    ],
)
def test_a_file_that_is_no_lock_is_replaced_after_a_lease(tmp_path, caplog, text, problem):
    (tmp_path / NAME).write_text(text)
    started = time.monotonic()
    with WriterLock(folder(tmp_path), NAME, LEASE / 4):
        assert LEASE / 8 < time.monotonic() - started < 60
    assert problem in caplog.text and "stale" in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to itself"])
def test_what_is_no_file_is_rejected_without_blocking(tmp_path, kind):
    (tmp_path / NAME).touch()
    SPECIAL_FILES[kind](tmp_path / NAME)
    with pytest.raises(StorageError, match=NAME), locked(tmp_path):
        pass


def test_a_file_is_opened_for_writing_as_nfs_demands(tmp_path, monkeypatch):
    real = lease.fcntl.flock

    def flock(descriptor, operation):
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor, operation)

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    file = tmp_path / "lock"
    file.touch()
    os.close(lease.try_lock(file))
    # A folder cannot be opened in this way.
    with pytest.raises(lease.LockUnsupported, match="cannot be locked"):
        lease.try_lock(tmp_path)


def test_a_process_of_any_name_is_a_holder(monkeypatch):
    read = pathlib.Path.read_text
    status = b"7 (\xff ) x) S " + b"0 " * 18 + b"99 0"

    def named(path, **options):
        return status.decode(**options) if path.name == "stat" else read(path, **options)

    monkeypatch.setattr(pathlib.Path, "read_text", named)
    state, start = lease._process_state(7)
    assert state == "S" and start.endswith(" 99")


def test_a_file_system_without_locks_differs_from_a_held_lock(tmp_path, monkeypatch):
    descriptor = lease.try_lock(tmp_path)
    assert lease.try_lock(tmp_path) is None
    os.close(descriptor)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lease.fcntl, "flock", unsupported)
    with pytest.raises(lease.LockUnsupported, match="No locks available"):
        lease.try_lock(tmp_path)


@pytest.mark.fault
def test_a_holder_that_lost_the_lock_raises_and_leaves_the_new_file(tmp_path):
    taken = json.dumps({"pid": 7, "host": "elsewhere", "since": "t"})
    with locked(tmp_path) as held:
        (tmp_path / NAME).write_text(taken)
        time.sleep(LEASE / 2)
        message = r"taken over by process 7 on elsewhere since t: .*not renewed it for 1 s"
        with pytest.raises(ValueError, match=message):
            held.check()
    assert (tmp_path / NAME).read_text() == taken


def test_a_holder_that_hung_for_a_lease_reads_the_file_first(tmp_path):
    with locked(tmp_path) as held:
        held._stop.set()
        held._thread.join()
        held._renewed_at -= 2 * LEASE
        held.check()
        assert json.loads((tmp_path / NAME).read_text())["beat"] > 0
