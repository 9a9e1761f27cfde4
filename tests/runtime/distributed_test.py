"""Joining a job: what is told, what is missing, and when nothing is asked. Real jobs: tests/launch."""

import contextlib
import sys

import jax
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.runtime.distributed import join
from launch.local import free_port
from tests.children import running

TIMES = {
    "initialization_timeout": 300,
    "heartbeat_timeout_seconds": 100,
    "shutdown_timeout_seconds": 7 * 24 * 3600,
}


@pytest.fixture
def joined(monkeypatch):
    """Arguments that JAX got."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


def test_a_single_process_initialises_nothing(joined):
    join()
    assert joined == []


def test_explicit_settings_are_passed_to_jax(joined):
    join(False, "127.0.0.1:8476", 2, 0, timeout=7)
    assert joined == [(("127.0.0.1:8476", 2, 0), TIMES | {"initialization_timeout": 7})]


def test_the_rest_is_found_by_jax(joined):
    join(True)
    assert joined == [((), TIMES)]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((False, "h:1", 2, None), "needs --coordinator_address, --num_processes and --process_id"),
        ((False, None, 2, 0), "all three, or --distributed alone"),
        ((True, "h:1", 2, 0), "got --distributed, coordinator_address=h:1"),
        ((False, "h", 2, 0), "must be HOST:PORT, got 'h'"),
        ((False, "h:1", 2, 2), r"--process_id must be from 0 to 1 \(--num_processes=2\), got 2"),
    ],
)
def test_invalid_values_are_rejected(joined, told, message):
    with pytest.raises(ValueError, match=message):
        join(*told)
    assert joined == []


def test_the_command_line_joins_before_it_runs(joined, capfd):
    flags = ["--coordinator_address=h:1", "--num_processes=3", "--process_id=1", "--gin_file=none"]
    assert command_line.main(flags) == 2  # for the gin file that is not there
    assert joined[0][0] == ("h:1", 3, 1)
    assert command_line.main(["--process_id=1"]) == 2
    assert "glimmer: A job of many processes needs" in capfd.readouterr().err


JOB = """
import sys
from glimmer_jax.runtime.supervisor import work_in_child
work_in_child(42)
from glimmer_jax.runtime.distributed import join, exit_after
address, me, seconds, who_fails = sys.argv[1], *map(int, sys.argv[2:])
join(False, address, 2, me, silence=10)
from jax.experimental import multihost_utils
if who_fails in (me, 2):
    exit_after(2, seconds)
    sys.exit(2)
multihost_utils.sync_global_devices("never")
"""


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("who_fails", "seconds", "codes"), [(2, 60, [2, 2]), (1, 2, [42, 2])], ids=["all", "one"]
)
def test_a_failing_process_exits_with_its_code_without_waiting(who_fails, seconds, codes):
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                running([sys.executable, "-c", JOB, address, *map(str, (me, seconds, who_fails))])
            )
            for me in range(2)
        ]
        assert [process.wait(240) for process in processes] == codes
