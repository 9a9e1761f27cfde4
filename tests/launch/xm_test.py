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

ROOT = pathlib.Path(__file__).parents[2]
needs_xmanager = pytest.mark.skipif(
    importlib.util.find_spec("xmanager") is None, reason="xmanager is not installed"
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """XManager keeps its list of experiments in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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


@needs_xmanager
@pytest.mark.timeout(900)
def test_sigterm_reaches_the_units_and_is_waited_for(home):
    slow = home / "python"
    slow.write_text(
        f"#!/bin/sh\ntrap 'sleep 1; touch {home}/saved; exit 42' TERM\n"
        f"touch {home}/up\nwhile :; do sleep 0.1; done\n"
    )
    slow.chmod(0o755)
    code = (
        "import sys; from launch import sweep, xm; "
        f"sys.executable = {str(slow)!r}; "
        "sys.exit(xm.run(sweep.Sweep((('a',), ('b',)), 1), 'title'))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as launcher:
        deadline = time.monotonic() + 300
        while not (home / "up").exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(120) == 42
    assert (home / "saved").exists()


def test_without_xmanager_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xmanager", None)
    with pytest.raises(ValueError, match="needs XManager, but .*pip install xmanager"):
        xm.run(sweep.Sweep((("local",),), 1), "title")


def test_without_axes_there_is_one_unit():
    made = sweep.plan([], ["local"], None, ["--gin.MODEL_DIR='runs/a'"], parallel=1)
    assert made.units == (
        ("local", "--", "--gin.MODEL_DIR='runs/a'", "--gin.MODEL_DIR='runs/a/1'"),
    )
    assert os.sep not in made.units[0][0]
