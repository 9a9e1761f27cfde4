"""The stand-in for gcloud, and a checkout that it copies to its worker."""

import functools
import os
import pathlib
import shutil
import subprocess

import pytest

import launch.__main__ as command_line
from launch import lifecycle

HERE = pathlib.Path(__file__).parent
# In the place of an environment: a python that writes down its arguments and obeys $JOB.
PYTHON = """#!/bin/sh
printf '%s\\n' "$@" > "$GCLOUD_STUB/seen"
eval "$JOB"
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """The stub's folder; it is on PATH, the code is a tiny checkout, and nothing waits long."""
    folder = tmp_path / "stub"
    (folder / "lives").mkdir(parents=True)
    for life in range(1, 5):
        (folder / "lives" / str(life)).touch()
    (folder / "bin").mkdir()
    shutil.copy(HERE / "gcloud_stub", folder / "bin" / "gcloud")
    (folder / "bin" / "gcloud").chmod(0o755)
    code = tmp_path / "code"
    code.mkdir()
    (code / "fake_python").write_text(PYTHON)
    (code / "fake_python").chmod(0o755)
    git = ["git", "-C", str(code), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    (code / "new.py").write_text("not committed\n")
    monkeypatch.setattr(command_line, "ROOT", code)
    monkeypatch.setattr(lifecycle, "run_plan", functools.partial(lifecycle.run_plan, poll=0.01))
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("GCLOUD_STUB", str(folder))
    monkeypatch.setenv("JOB", "exit 0")
    monkeypatch.chdir(tmp_path)
    return folder
