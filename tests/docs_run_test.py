"""The `sh` and `python` blocks of README and docs/ run exactly as they stand.

A page is a shell session in a copy of the checkout: its blocks run in order, and shell variables and
the current folder carry over. Pages that continue the tutorial share its copy.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import NEEDS, ROOT, blocks

pytest.importorskip("seqio")

# Each inner tuple is one session: a page and those that read what it wrote.
SESSIONS = (
    ("README",),
    ("docs/own_data",),
    (
        "docs/tutorial",
        "docs/serving",
        "docs/memory",
        "docs/retrieval",
        "docs/launching",
        "docs/t5x",
    ),
    ("docs/weights",),
    ("docs/configuration",),
    ("docs/kilt",),
    ("docs/pods",),
    ("docs/preflight",),
    ("docs/claims",),
    ("docs/results",),
    ("CONTRIBUTING",),
)
# Blocks that take more than seconds, or read what such a block wrote.
SLOW = re.compile(
    r"run_mode=(train|codebooks|build_memory|eval|infer)|pydocs_(passages|retrieve)|inspect"
    r"|Predictor\b|pydocs/|preflight|launch xm"
)
# Stands for `make quickstart`, which installs packages, before README's next block.
QUICKSTART = """glimmer --run_mode=passages --gin_file=gin/examples/pydocs_passages.gin \
    --gin.CORPUS_DIR="'quickstart/data/corpus'" --gin.PASSAGES_DIR="'quickstart/data/passages'"
"""
# Typed at the prompt of a block that needs a terminal.
TYPED = "find the n largest elements in a dataset\n"
BLOCKS = [
    (page, number, *block)
    for session in SESSIONS
    for page in session
    if (ROOT / f"{page}.md").exists()
    for number, block in enumerate(blocks(ROOT / f"{page}.md"))
    if block[0] in ("sh", "python")
]


def obstacles(needs):
    """Why a block does not run here."""
    reasons = [NEEDS[need] for need in needs.split(", ")] if needs else []
    return [
        reason
        for reason, module in reasons
        if module is None or importlib.util.find_spec(module) is None
    ]


def runnable(session, slow):
    """(page, number, language, text) of the blocks of a session that run here."""
    for page, number, language, needs, text in BLOCKS:
        if page in session and not obstacles(needs) and (slow or not SLOW.search(text)):
            yield page, number, language, text


def copy_checkout(folder):
    """Copies the checkout without hidden files, outputs and tests."""
    outputs = ("tests", "data", "runs", "quickstart", "build", "dist")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in outputs:
            continue
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / path.name, ignore=ignored)
        else:
            shutil.copy(path, folder)


class Shell:
    """Runs blocks one after the other; variables and the current folder carry over."""

    def __init__(self, folder):
        # The tests' own XLA flags are not those of a user.
        self.start = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.start |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            # Libraries without a package, such as T5X, are found there.
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(folder), os.environ.get("PYTHONPATH")))
            ),
            "PWD": str(folder),
        }
        self.new_page()

    def new_page(self):
        """Opens a new terminal in the checkout."""
        self.env = dict(self.start)

    def run(self, name, language, text):
        """What a block prints; raises AssertionError if it fails."""
        command = [sys.executable, "-c", text]
        if language == "sh":
            # -a exports variables, so that `env` shows them.
            command = ["bash", "-c", f"set -aeuo pipefail\n{text}\nprintf '\\0\\0'; env -0"]
        run = subprocess.run(
            command, cwd=self.env["PWD"], env=self.env, input=TYPED, capture_output=True, text=True
        )
        printed, _, variables = run.stdout.partition("\0\0")
        assert run.returncode == 0, f"{name}:\n{text}\n{printed}\n{run.stderr}"
        if language == "sh":
            pairs = (entry.partition("=") for entry in variables.split("\0") if entry)
            self.env = {variable: value for variable, _, value in pairs}
        return printed


def run_session(session, folder, slow):
    copy_checkout(folder)
    shell = Shell(folder)
    if slow and session == ("README",):
        shell.run("README", "sh", QUICKSTART)
    previous = None
    for page, number, language, text in runnable(session, slow):
        if page != previous:
            shell.new_page()
        previous = page
        printed = shell.run(f"{page}.md, block {number}", language, text)
        if promised := re.search(r"^print\(.*\)  # (.+)\n\Z", text, re.MULTILINE):
            assert printed.splitlines()[-1] == promised[1], f"{page}.md, block {number}"


def sessions(slow):
    return [
        pytest.param(session, id=session[0]) for session in SESSIONS if any(runnable(session, slow))
    ]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("session", sessions(slow=False))
def test_quick_blocks_run_as_they_stand(session, tmp_path):
    run_session(session, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("session", sessions(slow=True))
def test_all_blocks_run_as_they_stand(session, tmp_path):
    run_session(session, tmp_path, slow=True)


@pytest.mark.parametrize(
    "page, number, reasons",
    [
        pytest.param(page, number, reasons, id=f"{page}-{number}")
        for page, number, _, needs, _ in BLOCKS
        if (reasons := obstacles(needs))
    ],
)
def test_block_runs_elsewhere(page, number, reasons):
    pytest.skip(f"{page}.md, block {number}: {', '.join(reasons)}")


def test_every_page_is_in_a_session():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {Path(page).name for session in SESSIONS for page in session}


def test_a_failing_block_is_named_with_its_output(tmp_path):
    with pytest.raises(AssertionError, match="(?s)a page.*false.*before.*trouble"):
        Shell(tmp_path).run(
            "a page", "sh", "echo before; echo trouble >&2; false | cat; echo after"
        )


def test_variables_and_the_folder_carry_over_until_the_next_page(tmp_path):
    (tmp_path / "inner").mkdir()
    shell = Shell(tmp_path)
    shell.run("first", "sh", "model='two\n words'\ncd inner\n")
    assert (
        shell.run("second", "sh", 'echo "$model" in $PWD') == f"two\n words in {tmp_path}/inner\n"
    )
    shell.new_page()
    assert shell.run("third", "sh", "echo ${model:-none} in $PWD") == f"none in {tmp_path}\n"


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_own_data_runs_with_few_steps(tmp_path):
    copy_checkout(tmp_path)
    shell = Shell(tmp_path)
    for page, number, language, text in runnable(("docs/own_data",), slow=True):
        shorter = re.sub(r"TRAIN_STEPS=\d+", "TRAIN_STEPS=2", text)
        shell.run(f"{page}.md, block {number}", language, shorter)
    metrics = json.loads((tmp_path / "runs" / "codes" / "eval" / "metrics.json").read_text())
    assert 0 <= metrics["codes/exact_match"] <= 1 and 0 <= metrics["codes/recall_at_1"] <= 1
    answers = (tmp_path / "runs" / "codes" / "answers" / "predictions-codes-test.jsonl").read_text()
    assert json.loads(answers.splitlines()[0])["id"].startswith("errno/")


def test_own_data_shows_the_task_module_of_its_example():
    shown = next(text for page, _, _, _, text in BLOCKS if page == "docs/own_data")
    assert (ROOT / "examples" / "own_data" / "codes.py").read_text().endswith(shown)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux",
    reason="error numbers, statuses and names differ with version and platform",
)
def test_own_data_is_what_its_script_writes(tmp_path):
    data = ROOT / "examples" / "own_data"
    subprocess.run([sys.executable, data / "make_data.py", tmp_path], check=True)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (data / path.name).read_bytes(), path.name
