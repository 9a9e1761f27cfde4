"""The runner: exit codes, signals, and that nothing is left running."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import local
from launch.plans import shell
from launch.processes import TIED, Answer, Interrupts, read, run, run_again, run_showing_errors
from tests.children import running
from tests.training import toy_job

# Starting Python takes seconds on a loaded machine, and JAX takes more.
pytestmark = pytest.mark.timeout(600)

ROOT = pathlib.Path(__file__).parents[2]
TINY_JOB = str(pathlib.Path(__file__).with_name("tiny_job.py"))

# Runs its arguments, one shell command each, as `python -m launch local` runs processes.
DRIVER = """
import sys
from launch.processes import Interrupts, run
with Interrupts() as interrupts:
    sys.exit(run([("sh", "-c", text) for text in sys.argv[1:]], interrupts, grace=2))
"""


def sh(text):
    return ("sh", "-c", text)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie, whose exit code nobody has read, is dead.
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "It did not happen."
        time.sleep(0.05)


def start(*argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return running([sys.executable, *argv], env=environment)


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        (["exit 0", "exit 0"], 0),
        (["exit 0", "sleep 0.2; exit 42"], 42),
        (["kill -KILL $$"], 137),
    ],
)
def test_the_exit_code_is_the_jobs(commands, code):
    assert run([sh(text) for text in commands], Interrupts()) == code


def test_a_dead_process_ends_the_others_after_the_grace_period(capfd):
    begin = time.monotonic()
    assert run([sh("trap '' TERM; sleep 1000"), sh("exit 3")], Interrupts(), grace=0.5) == 3
    assert 0.5 <= time.monotonic() - begin < 30
    assert "a process ended with 3" in capfd.readouterr().out


def test_children_of_children_are_ended_too(tmp_path):
    assert run([sh(f"sleep 1000 & echo $! > {tmp_path}/pid")], Interrupts()) == 0
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(pid))


def test_a_command_that_does_not_exist_ends_the_rest(tmp_path):
    first = sh(f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    with pytest.raises(FileNotFoundError, match="no_such_command"):
        run([first, ("no_such_command",)], Interrupts())
    path = tmp_path / "pid"
    assert not path.exists() or not path.read_text() or not alive(int(path.read_text()))


def test_input_reaches_the_command_and_output_is_read(tmp_path):
    target = tmp_path / "out"
    assert run([sh(f"cat > {target}")], Interrupts(), stdin="a\nb\n") == 0
    assert target.read_text() == "a\nb\n"
    assert run([sh("exit 5")], Interrupts(), stdin="x" * 1_000_000) == 5


def test_an_answer_is_what_was_printed_and_complaints_are_shown(capfd):
    assert read(sh("echo READY; echo old >&2")) == Answer(0, "READY", "old")
    assert read(sh("echo READY; echo no >&2; exit 3")) == Answer(3, "READY", "no")
    assert capfd.readouterr().err == "old\nno\n"


def test_stderr_is_shown_immediately_and_returned(capfd):
    assert run_showing_errors(sh("echo no >&2; exit 3"), Interrupts()) == Answer(3, "", "no")
    assert capfd.readouterr().err == "no\n"
    code = (
        "import sys\nfrom launch.processes import Interrupts, run_showing_errors\n"
        "with Interrupts() as interrupts:\n"
        "    answer = run_showing_errors(('sh', '-c', sys.argv[1]), interrupts)\n"
        "print(answer.code, answer.errors)"
    )
    command = "trap 'echo late >&2; exit 42' TERM; echo early >&2; while :; do sleep 0.05; done"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with running([sys.executable, "-c", code, command], cwd=ROOT, **pipes) as driver:
        assert driver.stderr.readline() == "early\n"
        driver.terminate()
        text, shown = driver.communicate(timeout=60)
    assert text == f"42 early\n{shown}"
    assert shown.endswith("late\n")  # the shell may say before it that its sleep was ended


def test_a_silent_command_is_ended_with_what_it_started(tmp_path):
    begin = time.monotonic()
    answer = read(sh(f"echo $$ > {tmp_path}/pid; sleep 1000 & sleep 1000"), seconds=0.5)
    assert time.monotonic() - begin < 30
    assert answer == Answer(137, "", "sh gave no answer within 0.5 s")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_command_is_retried_until_it_succeeds(tmp_path, capfd):
    second = sh(f"test -e {tmp_path}/x || {{ touch {tmp_path}/x; exit 7; }}")
    assert run_again(second, Interrupts(), attempts=3, pause=0.01) == 0
    assert "exit code 7, retrying: sh -c" in capfd.readouterr().out
    assert run_again(sh("exit 7"), Interrupts(), attempts=2, pause=0.01) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_forwarded_and_the_exit_code_is_reported(tmp_path, number):
    command = "trap 'exit 42' TERM; echo $$ > {}; while :; do sleep 0.05; done"
    paths = [tmp_path / name for name in ("a", "b")]
    with start("-c", DRIVER, *(command.format(path) for path in paths)) as driver:
        wait_for(lambda: all(path.exists() and path.read_text() for path in paths))
        driver.send_signal(number)
        assert driver.wait(60) == 42
    assert not any(alive(int(path.read_text())) for path in paths)


def test_a_closed_terminal_counts_as_one_signal(tmp_path):
    command = (
        f"trap 'touch {tmp_path}/heard; sleep 1; exit 42' TERM; touch {tmp_path}/up; "
        "while :; do sleep 0.05; done"
    )
    with start("-c", DRIVER, command) as driver:
        wait_for((tmp_path / "up").exists)
        driver.send_signal(signal.SIGHUP)
        wait_for((tmp_path / "heard").exists)
        driver.send_signal(signal.SIGHUP)
        assert driver.wait(60) == 42


def test_under_nohup_the_end_of_the_terminal_is_nothing(tmp_path):
    command = f"touch {tmp_path}/up; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; exit 3"
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with start("-c", ignore + DRIVER, command) as driver:
        wait_for((tmp_path / "up").exists)
        driver.send_signal(signal.SIGHUP)
        (tmp_path / "end").touch()
        assert driver.wait(60) == 3


def test_without_a_terminal_all_that_was_started_is_ended_all_the_same(tmp_path):
    commands = [f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 1000", "sleep 1; exit 3"]
    script = f"import os\nos.dup2(os.open('/dev/full', 1), 1)\n{DRIVER}"
    with start("-c", script, *commands) as driver:
        assert driver.wait(60) == 3
    assert not alive(int((tmp_path / "pid").read_text()))
    read_noise = "from launch.processes import read\nread(('sh', '-c', 'echo no >&2'))\n"
    with start("-c", f"import os\nos.dup2(os.open('/dev/full', 1), 2)\n{read_noise}") as driver:
        assert driver.wait(60) == 0


def test_the_second_signal_kills(tmp_path):
    command = (
        f"trap 'touch {tmp_path}/heard' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    )
    with start("-c", DRIVER, command) as driver:
        wait_for((tmp_path / "up").exists)
        driver.terminate()
        wait_for((tmp_path / "heard").exists)
        assert driver.poll() is None
        driver.terminate()
        assert driver.wait(60) == 137


def test_a_launcher_that_another_one_started_stops_when_its_input_ends(tmp_path):
    code = f"from launch.processes import obey_input\nobey_input()\n{DRIVER}"
    command = f"trap 'exit 42' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), TIED: "1"}
    argv = [sys.executable, "-c", code, command]
    with running(argv, env=environment, stdin=subprocess.PIPE) as driver:
        wait_for((tmp_path / "up").exists)
        assert driver.poll() is None
        driver.stdin.close()
        assert driver.wait(60) == 42


def joined(count, *arguments, job=TINY_JOB):
    """Shell commands of a job's processes; `arguments` as the job takes them."""
    flags = [f"--gin_bindings={value}" for value in arguments]
    plan = local.plan(flags, count, local.free_port(), sys.executable)
    commands = [shell(argv).replace("-m glimmer_jax.main", job) for argv in plan.processes]
    return [f"exec {command}" for command in commands]


def test_two_jax_processes_add_up_and_stop_at_the_same_step(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with start("-c", DRIVER, *joined(2, tmp_path)) as driver:
        reports = [tmp_path / "0", tmp_path / "1"]
        wait_for(lambda: all(path.exists() or driver.poll() for path in reports), 400)
        driver.terminate()
        assert driver.wait(180) == 42
    first, second = (path.read_text().splitlines() for path in reports)
    assert first[0] == second[0] == "of 2 total 3"
    assert first[2] == second[2] and first[2].startswith("stopped at ")


@pytest.mark.fault
@pytest.mark.parametrize(
    "victim", [2, pytest.param(0, marks=pytest.mark.slow)], ids=["any", "first"]
)
def test_a_hanging_process_ends_the_job_and_is_reported(tmp_path, capfd, victim):
    with start("-c", DRIVER, *joined(4, tmp_path, 200, 6)) as driver:
        reports = [tmp_path / str(process) for process in range(4)]
        wait_for(lambda: all(path.exists() or driver.poll() for path in reports), 400)
        pids = [int(path.read_text().split()[-1]) for path in reports]
        os.kill(pids[victim], signal.SIGSTOP)
        stopped = time.monotonic()
        assert driver.wait(180) == 42
    # JAX's timeout, the time to abort, and the launcher's grace for the hanging process.
    assert time.monotonic() - stopped < 60
    assert f"glimmer: Process {victim} of the job no longer answers" in capfd.readouterr().err
    assert not any(alive(pid) for pid in pids)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_process_that_joins_too_late_ends_the_job(tmp_path, capfd, late):
    commands = joined(2, tmp_path, 3)
    late_one = commands.pop(late)
    for command in (*commands, late_one):
        with start("-c", DRIVER, command) as driver:
            assert driver.wait(120) == 42
        assert "glimmer: Not all processes joined the job in time" in capfd.readouterr().err


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes_train_as_one_and_go_on_after_one_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    steps, whole, stopped = 40, tmp_path / "whole", tmp_path / "stopped"

    def logged(folder):
        path = folder / "train" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    toy_job.run(whole, steps, jax.devices()[:4])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    with start("-c", DRIVER, *joined(4, stopped, steps, job="-m tests.training.toy_job")) as driver:
        # Behind the checkpoint of step 5, and before that of 15.
        wait_for(lambda: len(logged(stopped)) > 7 or driver.poll(), 400)
        os.kill(int((stopped / "pid2").read_text()), signal.SIGSTOP)
        assert driver.wait(180) == 42
    assert len(logged(stopped)) < steps
    with start("-c", DRIVER, *joined(4, stopped, steps, job="-m tests.training.toy_job")) as driver:
        assert driver.wait(400) == 0
    both = [logged(folder) for folder in (whole, stopped)]
    assert [[line["step"] for line in lines] for lines in both] == [list(range(1, steps + 1))] * 2
    # Also with dropout; another library sums over devices in another order.
    want, got = ([line["train/loss"] for line in lines] for lines in both)
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_process_saves_the_same_step_in_all(tmp_path, monkeypatch, capfd, told):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run, steps = tmp_path / "run", 2000
    logged = run / "train" / "metrics.jsonl"
    # Each by a launcher of its own, which says how it ended.
    commands = joined(2, run, steps, job="-m tests.launch.training_job")
    with start("-c", DRIVER, commands[0]) as first, start("-c", DRIVER, commands[1]) as second:
        # Past the checkpoint of step 5.
        wait_for(
            lambda: (
                (logged.exists() and len(logged.read_text().splitlines()) > 6)
                or first.poll()
                or second.poll()
            ),
            400,
        )
        os.kill(int((run / f"pid{told}").read_text()), signal.SIGTERM)
        assert (first.wait(120), second.wait(120)) == (42, 42)
    said = re.findall(rf"Stopped at step (\d+) of {steps}, saved", capfd.readouterr().err)
    assert len(said) == 2 and said[0] == said[1]
    assert (run / "checkpoints" / said[0] / "checksums.json").is_file()


@pytest.mark.fault
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_is_reported(tmp_path, capfd, victim):
    commands, reports = joined(2, tmp_path, 200, 6), [tmp_path / "0", tmp_path / "1"]
    with start("-c", DRIVER, commands[0]) as first, start("-c", DRIVER, commands[1]) as second:
        drivers = (first, second)
        wait_for(lambda: all(p.exists() for p in reports) or first.poll() or second.poll(), 400)
        pids = [int(path.read_text().split()[-1]) for path in reports]
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        assert drivers[victim].wait(60) == 137
        assert drivers[1 - victim].wait(60) == 42
    # JAX's patience, here of six seconds, and a while to abort.
    assert time.monotonic() - killed < 40
    assert f"glimmer: Process {victim} of the job no longer answers" in capfd.readouterr().err
    assert not any(alive(pid) for pid in pids)
