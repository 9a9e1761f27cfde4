"""Missing checkpoints and unknown tasks are reported before anything heavy is imported."""

import subprocess
import sys

import pytest

from glimmer_jax import configuration, shipped
from glimmer_jax.modes import early

TASK = ["--gin.MIXTURE_OR_TASK_MODULE='tasks.pydocs'"]
CASES = {
    "unknown task": (
        "train",
        ["runs/finetune"],
        [*TASK, "--gin.MIXTURE_OR_TASK_NAME='pydoc'"],
        ("MIXTURE_OR_TASK_NAME", "'pydoc'", "pydocs_renamed", "tasks.pydocs"),
    ),
    "task of an included file": (
        "eval",
        ["examples/pydocs_eval"],
        ["--gin.MIXTURE_OR_TASK_NAME='kilt_nq'"],
        ("MIXTURE_OR_TASK_NAME", "'kilt_nq'", "tasks.pydocs"),
    ),
    "checkpoint": (
        "infer",
        ["examples/pydocs_infer"],
        ["--gin.CHECKPOINT_PATH='none'"],
        ("CHECKPOINT_PATH", "no checkpoint none"),
    ),
    "initial checkpoint": (
        "train",
        ["runs/finetune"],
        ["--gin.INITIAL_CHECKPOINT_PATH='none'", "--gin.MODEL_DIR='m'"],
        ("INITIAL_CHECKPOINT_PATH", "no checkpoint none"),
    ),
}
CODE = """if True:
    import sys
    import time
    from glimmer_jax.main import main
    code = main(sys.argv[1:])
    assert time.process_time() < 3, time.process_time()
    heavy = {"jax", "flax", "numpy", "tensorflow", "seqio", "orbax"} & set(sys.modules)
    assert not heavy, heavy
    sys.exit(code)
"""


@pytest.mark.parametrize("case", CASES)
def test_it_is_reported_before_heavy_imports(case, tmp_path):
    mode, files, bindings, facts = CASES[case]
    command = [sys.executable, "-c", CODE, f"--run_mode={mode}", *bindings]
    command += [f"--gin_file=gin/{file}.gin" for file in files]
    environment = {"PYTHONPATH": str(shipped.root())}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("glimmer: ") and run.stderr.count("\n") == 1
    for fact in facts:
        assert fact in run.stderr


def test_a_resumed_run_needs_no_initial_checkpoint(tmp_path):
    macros = {"INITIAL_CHECKPOINT_PATH": "none", "MODEL_DIR": str(tmp_path)}
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(early.InvalidSetting, match="INITIAL_CHECKPOINT_PATH"):
        early.check(macros)
    (tmp_path / "checkpoints" / "7").mkdir()
    early.check(macros)
    early.check({**macros, "MODEL_DIR": "gs://bucket/run"})
    early.check({"CHECKPOINT_PATH": "gs://bucket/run"})


def test_modules_without_names_are_not_judged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = {"none": "", "computed": "NAMES = tuple(x for x in 'ab')", "some": "NAMES = ('a',)"}
    for name, source in sources.items():
        (tmp_path / f"tasks_{name}.py").write_text(source)
    names = {name: early.declared_names(f"tasks_{name}") for name in (*sources, "missing")}
    assert names == {"none": None, "computed": None, "some": ("a",), "missing": None}
    assert "tasks_some" not in sys.modules


@pytest.mark.parametrize("module", ["kilt", "pydocs", "pydocs_reading"])
def test_shipped_modules_declare_what_they_register(module):
    seqio = pytest.importorskip("seqio")
    from glimmer_jax.data import pipeline

    pipeline.import_tasks(f"tasks.{module}")
    registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    prefix = module.partition("_")[0]
    names = set(early.declared_names(f"tasks.{module}"))
    assert names <= registered
    ours = {name for name in registered if name.startswith(prefix)}
    # tasks.pydocs and tasks.pydocs_reading share their prefix.
    assert names == {name for name in ours if name.startswith("pydocs_reading_")} or names == {
        name for name in ours if not name.startswith("pydocs_reading_")
    }


def test_macros_with_text_follow_includes_bindings_and_the_last_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from no import such_module\n"
        "include 'b.gin'\n"
        "A = 'a'\nB = %A\nC = 'c'\nD = @such_module.f()\nE = 'e'\nscope/F = 'f'\n"
        "such_module.f:\n    x = 'x'\n"
    )
    (tmp_path / "b.gin").write_text("A = 'b'\nB = 'b'\nG = 'g'\n")
    macros = configuration.text_macros(["./a.gin"], ["C = None", "E = 'last'"])
    assert macros == {"A": "a", "E": "last", "G": "g"}
    assert configuration.text_macros(["a.gin"], ["C ="]) == {}
    assert configuration.text_macros(["missing.gin"]) == {}
    (tmp_path / "c.gin").write_text("include 'c.gin'\n")
    assert configuration.text_macros(["c.gin"]) == {}
