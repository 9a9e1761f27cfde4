"""glimmer's own commands in several processes, by the local launcher: the same as in one."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from glimmer_jax import shipped
from glimmer_jax.weights.load import load
from launch import local
from tests import mini_kilt
from tests.children import running
from tests.killed_commands_test import contents
from tests.kilt_road_test import GLIMMER, LENGTHS, TINY

pytest.importorskip("seqio")

ROOT = pathlib.Path(shipped.root())
STEPS = 4


def launch(processes, devices, mode, *files, **macros):
    """Output of a command in as many processes, each with as many virtual devices."""
    flags = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    flags += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    command = [sys.executable, "-m", "launch", "local", f"--num_processes={processes}", "--"]
    flag = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kilt")
    mini_kilt.write(folder)
    corpus = {"CORPUS": str(folder / "kilt_knowledgesource.json"), "CORPUS_FORMAT": "kilt"}
    passages = {"PASSAGES_DIR": str(folder / "passages")}
    cut = {**corpus, **passages, "PASSAGE_WORDS": mini_kilt.PASSAGE_WORDS, "VOCABULARY": "pydocs"}
    launch(1, 1, "passages", "runs/passages", **cut)
    questions = {
        "QUESTIONS": str(folder / "questions" / "fever-*-kilt.jsonl"),
        "QUESTION_WORDS": 12,
    }
    retrieved = {"DATA_DIR": str(folder / "retrieved"), "NUM_PASSAGES": 3}
    launch(1, 1, "retrieve", "runs/retrieve", **questions, **passages, **retrieved)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_train_build_and_evaluate_as_one(mini, tmp_path, count):
    data = {"PASSAGES_DIR": str(mini / "passages"), "DATA_DIR": str(mini / "retrieved")}
    task = {"MIXTURE_OR_TASK_NAME": "kilt_fever"}
    vocabulary = {"VOCABULARY": "pydocs"}
    sized = {**TINY, "TASK_FEATURE_LENGTHS": LENGTHS}
    apart, together = (tmp_path / "apart", count, 1), (tmp_path / "together", 1, count)

    training = {
        **data,
        **task,
        **vocabulary,
        **sized,
        "TRAIN_STEPS": STEPS,
        "BATCH_SIZE": 8,
        "LOG_EVERY": 1,
    }
    training |= {"EVAL_PERIOD": 0, "BEST_METRIC": None, "MESH_DATA": 1, "MESH_FSDP": count}
    for folder, *job in (apart, together):
        run = {**training, "MODEL_DIR": str(folder)}
        launch(*job, "train", *GLIMMER, "runs/finetune", "data/kilt", **run)
    losses = [
        [
            json.loads(line)["train/loss"]
            for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()
        ]
        for folder, *_ in (apart, together)
    ]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(*losses, rtol=1e-5)
    both = [load(folder).params for folder, *_ in (apart, together)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *both)

    # The checkpoint that many processes wrote, read by many and by one.
    shared = {"CHECKPOINT_PATH": str(apart[0]), "PASSAGES_DIR": data["PASSAGES_DIR"]}
    building = {**shared, **TINY, "MAX_PASSAGE_TOKENS": 32, "BATCH_SIZE": 2, "SHARD_PASSAGES": 3}
    asking = {**shared, **task, **sized, "DATA_DIR": data["DATA_DIR"], "BATCH_SIZE": 8}
    found = []
    for folder, *job in (apart, together):
        memory, output = folder / "memory", folder / "eval"
        launch(
            *job, "build_memory", *GLIMMER, "runs/build_memory", **building, MEMORY_DIR=str(memory)
        )
        places = {
            "MEMORY_DIR": str(memory),
            "EVAL_OUTPUT_DIR": str(output),
            "MIXTURE_OR_TASK_SPLIT": "validation",
        }
        launch(*job, "eval", *GLIMMER, "runs/eval", "data/kilt", **asking, **places)
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics.pop("seconds_waiting_for_memory") >= 0
        predictions = (output / "predictions-kilt_fever.jsonl").read_text()
        answers = output / "predictions-fever-dev.jsonl"
        asked = {**shared, **sized, "MEMORY_DIR": str(memory), "BATCH_SIZE": 8}
        asked |= {
            "QUESTIONS": f"{data['DATA_DIR']}/fever-dev.jsonl",
            "INFER_OUTPUT_DIR": str(output),
        }
        launch(*job, "infer", *GLIMMER, "runs/infer", **asked)
        found.append((metrics, predictions, contents(memory), answers.read_text()))
    for one, other in zip(*found, strict=True):
        assert one and one == other


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_learn_the_codebooks_of_one(mini, tmp_path):
    run = {**TINY, "MODEL_DIR": str(tmp_path / "run"), "TASK_FEATURE_LENGTHS": LENGTHS}
    run |= {"PASSAGES_DIR": str(mini / "passages"), "DATA_DIR": str(mini / "retrieved")}
    run |= {"MIXTURE_OR_TASK_NAME": "kilt_fever", "TRAIN_STEPS": 1, "BATCH_SIZE": 8}
    run |= {"EVAL_PERIOD": 0, "BEST_METRIC": None, "VOCABULARY": "pydocs"}
    launch(1, 1, "train", *GLIMMER, "runs/finetune", "data/kilt", **run)
    books = {**TINY, "MAX_PASSAGE_TOKENS": 32, "BATCH_SIZE": 2, "ITERATIONS": 2}
    books |= {"CHECKPOINT_PATH": str(tmp_path / "run"), "PASSAGES_DIR": run["PASSAGES_DIR"]}
    found = []
    for processes in (1, 2):
        path = str(tmp_path / f"{processes}.safetensors")
        settings = {**books, "OUTPUT_PATH": path, "MEMORY_CODEC": "pq"}
        launch(processes, 1, "codebooks", *GLIMMER, "runs/codebooks", **settings)
        found.append(load(path).params)
    jax.tree.map(np.testing.assert_array_equal, *found)

    # A process is killed after the output is complete: the restarted job keeps it.
    settings["OUTPUT_PATH"] = str(tmp_path / "killed.safetensors")
    described = tmp_path / "killed.json"
    assert killed_at_the_end(described, "codebooks", *GLIMMER, "runs/codebooks", **settings) != 0
    written = os.stat(described)
    said = launch(2, 1, "codebooks", *GLIMMER, "runs/codebooks", **settings)
    assert "killed.safetensors is complete and kept" in said
    assert os.stat(described) == written and not list(tmp_path.glob(".*.lock"))


def killed_at_the_end(output, mode, *files, **macros):
    """Exit code of process 0 of two, whose peer is killed once `output` exists."""
    flags = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    flags += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    flags += [f"--coordinator_address=127.0.0.1:{local.free_port()}", "--num_processes=2"]
    environment = {
        **os.environ,
        "OUTPUT": str(output),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
    }
    script = str(pathlib.Path(__file__).parent / "dying_job.py")
    with contextlib.ExitStack() as stack:
        first, _ = (
            stack.enter_context(
                running(
                    [sys.executable, script, *flags, f"--process_id={i}"], cwd=ROOT, env=environment
                )
            )
            for i in range(2)
        )
        return first.wait(300)
