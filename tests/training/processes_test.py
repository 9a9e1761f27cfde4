"""Runs that resume with another number of processes, without losing a bit or an example."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launch import local

ROOT = pathlib.Path(__file__).parents[2]


def start(command, devices):
    """A process with this number of virtual devices, whose output can be read."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process, seconds=300):
    """The exit code and the output of a process and its children."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
    return process.returncode, output


def logged(run):
    path = run / "train" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def start_job(processes, devices, *bindings):
    """Starts the processes of `moving_job`."""
    job = ["-m", "tests.training.moving_job", *(f"--gin_bindings={value}" for value in bindings)]
    if processes == 1:
        return [start(job, devices)]
    job += [f"--coordinator_address=127.0.0.1:{local.free_port()}", f"--num_processes={processes}"]
    return [start([*job, f"--process_id={i}"], devices) for i in range(processes)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_state_restores_bit_exactly_on_any_mesh_of_any_processes(tmp_path):
    run, steps = tmp_path / "run", 0
    for processes, devices, mesh in (
        (1, 4, "2,2,1"),
        (4, 1, "1,4,1"),
        (2, 2, "1,2,2"),
        (1, 1, "1,1,1"),
        (2, 2, "2,1,2"),
    ):
        steps += 2
        # Each process compares its restored state with that of the previous job.
        for process in start_job(processes, devices, run, steps, mesh):
            code, output = ended(process)
            assert code == 0, output
    assert [line["step"] for line in logged(run)] == list(range(1, steps + 1))


@pytest.mark.fault
def test_two_processes_interrupt_an_evaluation_together_and_save(tmp_path):
    first, second = start_job(2, 1, tmp_path / "run", 50, "2,1,1", 600)
    while first.stdout.readline() not in ("evaluating\n", ""):
        pass
    # One process gets the signal.
    second.terminate()
    for process in (first, second):
        code, output = ended(process, 60)
        assert code == 42 and "Stopped at step 3 of 50, saved." in output, output


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_run_of_two_processes_resumes_in_one_and_in_four(tmp_path):
    killed_commands = pytest.importorskip("tests.killed_commands_test")

    def train(run, processes, devices):
        flags = killed_commands.training(run)
        launch = ["-m", "launch", "local", f"--num_processes={processes}", "--"]
        return start([*launch, *flags], devices)

    uninterrupted, first = tmp_path / "uninterrupted", tmp_path / "first"
    code, output = ended(train(uninterrupted, 1, 1))
    assert code == 0, output
    stopped = train(first, 2, 1)
    while stopped.poll() is None and len(logged(first)) < 13:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    code, output = ended(stopped)
    assert code == 42 and "Stopped at step" in output, output
    wanted = logged(uninterrupted)
    assert 12 < len(logged(first)) < len(wanted) == killed_commands.STEPS
    for processes, devices in ((1, 2), (4, 1)):
        run = shutil.copytree(first, tmp_path / f"{processes}")
        code, output = ended(train(run, processes, devices))
        assert code == 0 and f"Training from step {len(logged(first))} " in output, output
        lines = logged(run)
        assert [line["step"] for line in lines] == [line["step"] for line in wanted]
        # The examples are the same; devices sum in a different order.
        losses = ([line["train/loss"] for line in each] for each in (lines, wanted))
        np.testing.assert_allclose(*losses, rtol=1e-3)
        assert run.joinpath("checkpoints", str(killed_commands.STEPS), "checksums.json").is_file()
