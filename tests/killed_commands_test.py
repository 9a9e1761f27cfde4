"""kill -9 and SIGTERM through the command line: started again, a command ends as if left alone."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import gin
import jax
import numpy as np
import pytest

from glimmer_jax import main as command_line
from glimmer_jax import shipped
from glimmer_jax.memory.manifest import MANIFEST, RECORD
from glimmer_jax.weights.load import load

pytest.importorskip("seqio")

ROOT = pathlib.Path(shipped.root())
SIZES = {
    "NUM_ENCODER_LAYERS": 3,
    "t5.T5Config.num_decoder_layers": 1,
    "t5.T5Config.emb_dim": 8,
    "t5.T5Config.num_heads": 3,
    "t5.T5Config.head_dim": 4,
    "t5.T5Config.mlp_dim": 16,
}
STEPS = 60


@pytest.fixture(autouse=True)
def clear():
    yield
    gin.clear_config()


def arguments(mode, *files, **macros):
    flags = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    return [*flags, *(f"--gin.{name}={value!r}" for name, value in macros.items())]


def training(model_dir):
    changes = {"TRAIN_STEPS": STEPS, "LOG_EVERY": 1, "CHECKPOINT_EVERY": 10, **SIZES}
    return arguments("train", "examples/pydocs_start_train", MODEL_DIR=str(model_dir), **changes)


def stopped(command, number, when):
    """The exit code of the command, which gets signal `number` as soon as `when()`; and its output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glimmer_jax.main", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not when():
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def logged(model_dir):
    path = model_dir / "train" / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("runs") / "left_alone"
    assert command_line.main(training(model_dir)) == 0
    return model_dir


@pytest.mark.fault
@pytest.mark.parametrize(
    "number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 42)], ids=["kill", "term"]
)
def test_killed_training_resumes_and_ends_equal(left_alone, tmp_path, number, code):
    model_dir = tmp_path / "run"

    def a_checkpoint_later():
        return (model_dir / "checkpoints" / "10").is_dir() and len(logged(model_dir)) > 14

    returned, output = stopped(training(model_dir), number, a_checkpoint_later)
    assert returned == code, output
    assert command_line.main(training(model_dir)) == 0
    both = [load(folder).params for folder in (model_dir, left_alone)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    steps = [json.loads(line)["step"] for line in logged(model_dir)]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


@pytest.mark.fault
def test_a_killed_memory_build_resumes_and_ends_byte_equal(left_alone, tmp_path):
    corpus, passages = tmp_path / "corpus.jsonl", str(tmp_path / "passages")
    lines = [{"id": i, "title": f"t{i}", "text": f"passage {i} " * (i % 7)} for i in range(400)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cutting = {"CORPUS": str(corpus), "PASSAGES_DIR": passages, "MAX_PASSAGE_TOKENS": 16}
    cutting["VOCABULARY"] = "pydocs"
    assert command_line.main(arguments("passages", "runs/passages", **cutting)) == 0

    def building(memory):
        return arguments(
            "build_memory",
            "runs/build_memory",
            CHECKPOINT_PATH=str(left_alone),
            PASSAGES_DIR=passages,
            MEMORY_DIR=str(memory),
            MAX_PASSAGE_TOKENS=16,
            BATCH_SIZE=1,
            SHARD_PASSAGES=8,
        )

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    returned, output = stopped(
        building(killed), signal.SIGKILL, lambda: len(list(killed.rglob(RECORD))) > 3
    )
    assert returned == -signal.SIGKILL, output
    assert not (killed / MANIFEST).exists()
    for memory in (killed, whole):
        assert command_line.main(building(memory)) == 0
    assert contents(killed) == contents(whole)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
