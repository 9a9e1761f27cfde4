"""A sweep as an XManager experiment: units, their folders, a failing one, and being stopped."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import sweep, xm
from tests import mini_kilt
from tests.children import running
from tests.kilt_road_test import GLIMMER, LENGTHS, TINY

ROOT = pathlib.Path(__file__).parents[2]
needs_xmanager = pytest.mark.skipif(
    importlib.util.find_spec("xmanager") is None, reason="xmanager is not installed"
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """XManager keeps its list of experiments in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    # XManager may be on the path that the tests were given.
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.chdir(tmp_path)
    line = {
        "id": 1,
        "title": "a",
        "text": "a sentence of some more words than eight, and still more",
    }
    (tmp_path / "corpus.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def command(*options):
    flags = ["--run_mode=passages", "--gin_file=gin/runs/passages.gin"]
    flags += ["--gin.CORPUS='corpus.jsonl'", "--gin.PASSAGES_DIR='passages'"]
    flags += ["--gin.VOCABULARY='pydocs'"]
    return [sys.executable, "-m", "launch", "xm", *options, "local", "--", *flags]


@needs_xmanager
@pytest.mark.timeout(900)
def test_each_unit_gets_its_value_and_its_folder(home):
    options = ["--sweep=MAX_PASSAGE_TOKENS=[8, 12, -1]", "--parallel=3"]
    done = subprocess.run(command(*options), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # for the third unit
    assert "launch: unit 3 failed: " in done.stdout
    assert "unit 1 failed" not in done.stdout
    for number, tokens in ((1, 8), (2, 12)):
        kept = json.loads((home / "passages" / f"{number}.launch.json").read_text())
        assert f"--gin.MAX_PASSAGE_TOKENS={tokens}" in kept["argv"]
        assert (home / "passages" / str(number)).is_dir()
    assert (home / "passages.launch.json").is_file()


def bindings(**macros):
    return [f"--gin.{name}={value!r}" for name, value in macros.items()]


def glimmer(mode, **macros):
    flags = [f"--run_mode={mode}", f"--gin_file=gin/runs/{mode}.gin", *bindings(**macros)]
    subprocess.run([sys.executable, "-m", "glimmer_jax.main", *flags], check=True)


@needs_xmanager
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_trains_each_unit_with_its_seed(home, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    mini_kilt.write(home)
    passages = {"PASSAGES_DIR": "passages"}
    corpus = {"CORPUS": "kilt_knowledgesource.json", "CORPUS_FORMAT": "kilt"}
    words = {"PASSAGE_WORDS": mini_kilt.PASSAGE_WORDS, "VOCABULARY": "pydocs"}
    glimmer("passages", **corpus, **passages, **words)
    retrieved = {**passages, "DATA_DIR": "retrieved"}
    asked = {"QUESTIONS": "questions/fever-*-kilt.jsonl", "QUESTION_WORDS": 12}
    glimmer("retrieve", **asked, **retrieved, NUM_PASSAGES=3)

    steps = {"TRAIN_STEPS": 2, "BATCH_SIZE": 8, "LOG_EVERY": 1, "EVAL_PERIOD": 0}
    task = {"MIXTURE_OR_TASK_NAME": "kilt_fever", "TASK_FEATURE_LENGTHS": LENGTHS}
    files = [f"--gin_file=gin/{name}.gin" for name in (*GLIMMER, "runs/finetune", "data/kilt")]
    run = {**TINY, **task, **retrieved, **steps, "BEST_METRIC": None, "MODEL_DIR": "runs"}
    run["VOCABULARY"] = "pydocs"
    own = ["xm", "--sweep=RANDOM_SEED=[0, 1]", "--parallel=2", "local", "--", "--run_mode=train"]
    argv = [sys.executable, "-m", "launch", *own, *files, *bindings(**run)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = []
    for unit, seed in ((1, 0), (2, 1)):
        folder = home / "runs" / str(unit)
        assert (
            f"--gin.RANDOM_SEED={seed}" in json.loads((folder / "launch.json").read_text())["argv"]
        )
        assert (folder / "checkpoints" / "2" / "checksums.json").is_file()
        logged = (folder / "train" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in logged] == [1, 2]
        losses.append([json.loads(line)["train/loss"] for line in logged])
    assert losses[0] != losses[1]


@needs_xmanager
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_what_stops_the_experiment_stops_its_units(home, number):
    """Each unit runs, in the place of glimmer, a job that saves when it is told to stop."""
    saves = f"trap 'sleep 1; touch {home}/saved; exit 42' TERM"
    job = f"{saves}; echo $$ > {home}/up; while :; do sleep 0.1; done"
    stand_in = home / "stand_in" / "launch"
    stand_in.mkdir(parents=True)
    for path in (ROOT / "launch").glob("*.py"):
        (stand_in / path.name).symlink_to(path)
    (stand_in / "__main__.py").unlink()
    (stand_in / "__main__.py").write_text(
        "import sys\nfrom launch.processes import Interrupts, obey_input, run\nobey_input()\n"
        f"with Interrupts() as interrupts:\n    sys.exit(run([('sh', '-c', {job!r})], interrupts))\n"
    )
    code = (
        # Should it ever hang, this shows where.
        "import faulthandler, pathlib, sys; faulthandler.dump_traceback_later(200); "
        "from glimmer_jax import shipped; from launch import sweep, xm; "
        f"shipped.root = lambda: pathlib.Path({str(stand_in.parent)!r}); "
        "sys.exit(xm.run(sweep.Sweep((('a',), ('b',)), 1), 'title'))"
    )
    with running([sys.executable, "-c", code]) as launcher:
        up = home / "up"
        wait_for(lambda: (up.exists() and up.read_text()) or launcher.poll() is not None)
        launcher.send_signal(number)
        assert launcher.wait(300) == (-number if number == signal.SIGKILL else 42)
    if number == signal.SIGKILL:  # What the job prints then has no reader: it may die of that.
        wait_for(lambda: not pathlib.Path(f"/proc/{up.read_text().strip()}").exists())
    else:
        assert (home / "saved").exists()


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "It did not happen."
        time.sleep(0.05)


def test_a_missing_xmanager_is_reported_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "xmanager", None)
    wanted = r"needs XManager, but .*pip install -c constraints\.txt '\.\[xm\]'"
    with pytest.raises(ValueError, match=wanted):
        xm.run(sweep.Sweep((("local",),), 1), "title")


def test_without_axes_there_is_one_unit():
    made = sweep.plan([], ["local"], None, ["--gin.MODEL_DIR='runs/a'"], parallel=1)
    assert made.units == (
        ("local", "--", "--gin.MODEL_DIR='runs/a'", "--gin.MODEL_DIR='runs/a/1'"),
    )
    assert os.sep not in made.units[0][0]


def test_a_sweep_over_parameter_files_numbers_their_names():
    flags = ["--run_mode=codebooks", "--gin.OUTPUT_PATH='runs/pq.safetensors'"]
    made = sweep.plan([("RANDOM_SEED", [0, 1])], ["local"], None, flags, parallel=1)
    paths = [unit[-1] for unit in made.units]
    assert paths == [f"--gin.OUTPUT_PATH='runs/pq-{number}.safetensors'" for number in (1, 2)]
