"""How JAX ends a process of a job, explained; and a parent that ends as its child does."""

import signal
import subprocess
import sys
import time

import pytest

from glimmer_jax.runtime.supervisor import describe_abort

FATAL = (
    "F1126 01:42:01.173387   11177 client.h:80] Terminating process because the JAX distributed service "
    "detected fatal errors. This most likely indicates that another task died; see the other task logs "
    "for more details. absl::Status: "
)
SILENT = """UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
2
13
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.

RPC: /xla.coordination.CoordinationService/PollForError
"""
SHUTDOWN = """INTERNAL: Shutdown barrier has failed.
Barrier result: 'INTERNAL: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout. This indicates
"""
SCRIPT = """
import os, signal, sys, time
from glimmer_jax.runtime.supervisor import work_in_child
work_in_child(42)
print(os.getpid(), flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (FATAL + SILENT, "Process 2, 13 of the job no longer answers"),
        (FATAL + SHUTDOWN, "Process 1 of the job no longer answers"),
        (
            FATAL + "DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/Heartbeat\n",
            "Process 0 of the job no longer answers",
        ),
        ('grpc_message:"Socket closed"\n' + FATAL, "Process 0 of the job no longer answers"),
        (
            FATAL
            + "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task\n"
            ':UNKNOWN:Error received from peer  {grpc_message:"recvmsg:Connection reset by peer"}\n',
            "Process 0 of the job no longer answers",
        ),
        (FATAL + "INTERNAL: something else", "Another process of the job no longer answers"),
        (
            FATAL
            + "DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask\n",
            "Not all processes joined the job in time",
        ),
    ],
)
def test_the_missing_process_is_reported(words, expected):
    found = describe_abort("step 14  train\n" + words)
    assert found.startswith(expected) and "Run the same command again" in found


def test_an_abort_for_other_reasons_is_not_explained():
    assert describe_abort("free(): invalid pointer\n" + SILENT) is None
    failed = (
        "DEADLINE_EXCEEDED: Barrier timed out. Id: Shutdown::127. The first task at the barrier: 1."
    )
    assert (
        describe_abort(f"{FATAL}INTERNAL: Shutdown barrier has failed.\nBarrier result: {failed}")
        is None
    )


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("os.write(2, b'x\\n'); sys.exit(2)", 2, "x\n"),
        ("os.abort()", 128 + signal.SIGABRT, ""),
        ("signal.raise_signal(signal.SIGKILL)", 128 + signal.SIGKILL, ""),
    ],
)
def test_the_parent_ends_as_its_child(end, code, said):
    script = SCRIPT.format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_an_abort_due_to_another_process_exits_with_the_retry_code():
    end = f"os.write(2, {(FATAL + SILENT).encode()!r}); os.abort()"
    script = SCRIPT.format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 42
    # What JAX says passes, and ours is the last word.
    assert done.stderr.startswith(FATAL)
    assert done.stderr.splitlines()[-1].startswith("glimmer: Process 2, 13 of the job")


def waiting(end):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(end=end)], stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def test_sigterm_reaches_the_child_once():
    count = "n = []\nsignal.signal(signal.SIGTERM, lambda *_: n.append(0))\n"
    loop = "print('ready', flush=True)\nwhile not n: time.sleep(0.01)\ntime.sleep(0.3)\nsys.exit(len(n))"
    process, _ = waiting(count + loop)
    with process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(60) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_child_of_a_killed_parent_dies_too():
    process, _ = waiting("time.sleep(1000)")
    with process:
        process.kill()
        # The child holds the other end of its output until it is gone.
        began = time.monotonic()
        assert process.stdout.read() == ""
    assert time.monotonic() - began < 60
