"""Signals at random moments: a stopped command ends with 42 or 0, and a rerun completes its output."""

import json
import os
import pathlib
import random
import signal
import sys
import time

import jax
import numpy as np
import pytest

from glimmer_jax import shipped
from glimmer_jax.weights.load import load
from tests.children import running

pytest.importorskip("seqio")

ROOT = pathlib.Path(shipped.root())
# Starting Python with JAX and TensorFlow takes long on a loaded machine.
SECONDS = 400
MOMENTS = int(os.environ.get("GLIMMER_STOP_MOMENTS", "100"))
WORDS = ("red", "green", "blue", "black", "white", "grey")
SIZES = {
    "NUM_ENCODER_LAYERS": 3,
    "t5.T5Config.num_decoder_layers": 1,
    "t5.T5Config.emb_dim": 8,
    "t5.T5Config.num_heads": 2,
    "t5.T5Config.head_dim": 4,
    "t5.T5Config.mlp_dim": 16,
}
LENGTHS = {"TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 16, "passages": (3, 16)}}
GLIMMER = ("sizes/tiny", "models/glimmer")
# The modes whose output each mode reads.
INPUTS = {
    "retrieve": ("passages",),
    "cache": ("passages", "retrieve"),
    "train": ("passages", "retrieve"),
    "build_memory": ("passages", "train"),
    "codebooks": ("passages", "train"),
    "export": ("train",),
    "eval": ("passages", "retrieve", "train"),
    "infer": ("passages", "retrieve", "train"),
    "verify": ("build_memory",),
}
# One device: eight on two cores wait for each other.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
pytestmark = [pytest.mark.fault]


def command(mode, *files, **macros):
    flags = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    return [*flags, *(f"--gin.{name}={value!r}" for name, value in macros.items())]


class Commands:
    """Each mode's command, over one folder of inputs; `out` is where it writes."""

    def __init__(self, folder):
        self.folder = folder
        self.finished = set()
        self.data = {"PASSAGES_DIR": f"{folder}/passages", "DATA_DIR": f"{folder}/retrieved"}
        self.model = {"CHECKPOINT_PATH": f"{folder}/run", "PASSAGES_DIR": f"{folder}/passages"}
        self.passage_sizes = {"MAX_PASSAGE_TOKENS": 16, "BATCH_SIZE": 8, **SIZES}

    def prepare(self, mode):
        """Runs the modes that `mode` reads the output of, each once."""
        for needed in INPUTS.get(mode, ()):
            if needed not in self.finished:
                self.prepare(needed)
                code, output, _ = run(getattr(self, needed)(self.folder))
                assert code == 0, output
                self.finished.add(needed)

    def passages(self, out):
        corpus = {"CORPUS": f"{self.folder}/corpus.jsonl", "PASSAGES_DIR": f"{out}/passages"}
        return command(
            "passages", "runs/passages", **corpus, VOCABULARY="pydocs", MAX_PASSAGE_TOKENS=16
        )

    def retrieve(self, out):
        places = {"QUESTIONS": f"{self.folder}/questions/*.jsonl", "DATA_DIR": f"{out}/retrieved"}
        passages = {"PASSAGES_DIR": f"{self.folder}/passages", "NUM_PASSAGES": 3}
        return command("retrieve", "runs/retrieve", **places, **passages)

    def cache(self, out):
        task = {"MIXTURE_OR_TASK_NAME": "pydocs", "MIXTURE_OR_TASK_MODULE": "tasks.pydocs"}
        places = {"DATA_DIR": self.data["DATA_DIR"], "CACHE_DIR": f"{out}/cache"}
        return command("cache", "runs/cache", **task, **places)

    def train(self, out):
        # Other modes need a checkpoint only.
        steps, eval_period = (1, 0) if out == self.folder else (20, 10)
        settings = {"TRAIN_STEPS": steps, "EVAL_PERIOD": eval_period, "CHECKPOINT_EVERY": 5}
        task = {
            "MIXTURE_OR_TASK_NAME": "pydocs",
            "BEST_METRIC": None,
            "BATCH_SIZE": 8,
            "LOG_EVERY": 1,
        }
        sizes = {"EVALUATOR_NUM_EXAMPLES": 8, **SIZES, **LENGTHS}
        macros = {**settings, **task, **sizes, **self.data, "MODEL_DIR": f"{out}/run"}
        return command("train", "examples/pydocs_glimmer_train", **macros)

    def build_memory(self, out):
        macros = {**self.model, **self.passage_sizes, "MEMORY_DIR": f"{out}/memory"}
        return command("build_memory", *GLIMMER, "runs/build_memory", SHARD_PASSAGES=8, **macros)

    def codebooks(self, out):
        macros = {**self.model, **self.passage_sizes, "OUTPUT_PATH": f"{out}/pq.safetensors"}
        return command("codebooks", *GLIMMER, "runs/codebooks", MEMORY_CODEC="pq", **macros)

    def export(self, out):
        places = {
            "CHECKPOINT_PATH": f"{self.folder}/run",
            "OUTPUT_PATH": f"{out}/model.safetensors",
        }
        return command("export", *GLIMMER, "runs/export", **places, **SIZES)

    def eval(self, out):
        macros = {**self.model, **self.data, "EVAL_OUTPUT_DIR": f"{out}/eval"}
        return command("eval", "examples/pydocs_eval", BATCH_SIZE=8, **macros)

    def infer(self, out):
        questions = f"{self.folder}/questions/which_function-test.jsonl"
        macros = {**self.model, "QUESTIONS": questions}
        return command("infer", "examples/pydocs_infer", INFER_OUTPUT_DIR=f"{out}/infer", **macros)

    def verify(self, out):
        return command("memory", "runs/memory", ACTION="verify", MEMORY_DIR=f"{self.folder}/memory")


MODES = ["passages", *INPUTS]
# Files that hold times, or what is compared otherwise.
VARYING = ("metrics.json", "metrics.jsonl", "events.out", "config.gin", "checkpoints", "dev")


def run(arguments, stop_after=None, number=signal.SIGTERM):
    """Exit code, output and seconds of a command.

    It gets signal `number` `stop_after` seconds after it has set a handler for SIGTERM.
    """
    with running(
        [sys.executable, "-m", "glimmer_jax.main", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=-1,
        stderr=-2,
        text=True,
    ) as process:
        while process.poll() is None and not hears_sigterm(process.pid):
            time.sleep(0.005)
        began = time.monotonic()
        if stop_after is not None:
            time.sleep(stop_after)
            process.send_signal(number)
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output, time.monotonic() - began


def hears_sigterm(pid):
    """Whether the process has set a handler. Before, for some milliseconds, SIGTERM just kills it."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def contents(folder, killed=False):
    """The contents that must not depend on how often the command was stopped, or killed."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(VARYING) for part in path.parts)
        and not (killed and any(is_temporary(part) for part in path.relative_to(folder).parts))
    }
    if (folder / "run").exists():
        files["params"] = [
            np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load(folder / "run").params)
        ]
    return files


def is_temporary(name):
    """Whether it is what a killed process may leave behind."""
    return name.startswith(".") or "unfinished" in name


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    lines = [{"id": i, "title": WORDS[i % 6], "text": f"{WORDS[i % 6]} {i}"} for i in range(120)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "questions").mkdir()
    for task in ("which_function", "slot_filling", "fact_verification"):
        for split in ("train", "dev", "test"):
            text = "".join(
                json.dumps(
                    {
                        "id": f"{task}/{split}/{i}",
                        "input": f"{WORDS[i % 6]} {i}",
                        "output": [
                            {"answer": WORDS[i % 6], "provenance": [{"title": WORDS[i % 6]}]}
                        ],
                    }
                )
                + "\n"
                for i in range(16)
            )
            (folder / "questions" / f"{task}-{split}.jsonl").write_text(text)
    return Commands(folder)


def check(commands, tmp_path, mode, moments, number=signal.SIGTERM):
    """Stops or kills the mode `moments` times, at random; then it is run to its end each time."""
    killed = number == signal.SIGKILL
    commands.prepare(mode)
    complete = tmp_path / "complete"
    complete.mkdir()
    make = getattr(commands, mode)
    code, output, seconds = run(make(complete))
    assert code == 0, output
    for moment in range(moments):
        out = tmp_path / str(moment)
        out.mkdir()
        # A little longer than the command takes, so that it sometimes ends first.
        after = random.uniform(0.0, 1.1 * seconds)
        code, output, _ = run(make(out), after, number)
        case = f"{number.name} after {after:.3f} s of {seconds:.1f}, exit code {code}\n{output}"
        assert code in (0, -number if killed else 42), case
        assert "Traceback" not in output and "Exception ignored" not in output, case
        if code:
            assert killed or "same command" in output or "saved" in output, case
            code, output, _ = run(make(out))
            assert code == 0, f"{case}\nresumed:\n{output}"
        assert contents(out, killed) == contents(complete, killed), case


@pytest.mark.timeout(1800)
def test_a_command_stopped_once_resumes_or_is_complete(commands, tmp_path):
    # `killed_commands_test` stops a training.
    check(commands, tmp_path, "passages", moments=1)


@pytest.mark.slow
@pytest.mark.timeout(100 * 3600)
@pytest.mark.parametrize("mode", MODES)
def test_a_command_killed_at_any_moment_is_completed_by_a_rerun(commands, tmp_path, mode):
    check(commands, tmp_path, mode, moments=MOMENTS, number=signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(100 * 3600)
@pytest.mark.parametrize("mode", MODES)
def test_a_command_stopped_at_any_moment_resumes_or_is_complete(commands, tmp_path, mode):
    check(commands, tmp_path, mode, moments=MOMENTS)
