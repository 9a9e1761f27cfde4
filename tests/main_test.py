"""The command line, from corpus to answers on a tiny model; bad input ends with one line."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys

import gin
import jax
import pytest

from glimmer_jax import main as command_line
from glimmer_jax import shipped
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage.errors import storage_error
from glimmer_jax.vocabulary import PYDOCS_MODEL

ROOT = pathlib.Path(shipped.root())
SHIPPED = str(shipped.CHECKPOINTS / "pydocs_glimmer.safetensors")
ABLATIONS = sorted(path.stem for path in (ROOT / "gin" / "ablations").glob("*.gin"))
# Those of a group can be combined. One by one they take minutes to compile.
ABLATION_GROUPS = [
    [
        *("alpha", "frozen_memory", "kl_direction", "m", "separate_question_encoder"),
        *("single_task", "temperature"),
    ],
    ["beta", "k", "no_distillation", "separate_reranker"],
]

# The examples at a size that compiles in seconds.
TINY = [
    "--gin.NUM_ENCODER_LAYERS=3",
    "--gin.t5.T5Config.num_decoder_layers=1",
    "--gin.t5.T5Config.emb_dim=8",
    "--gin.t5.T5Config.num_heads=2",
    "--gin.t5.T5Config.head_dim=4",
    "--gin.t5.T5Config.mlp_dim=16",
]
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16, 'passages': (3, 16)}"


@pytest.fixture(autouse=True)
def clear():
    yield
    gin.clear_config()


def run(mode, *files, **macros):
    arguments = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    arguments += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    # The other modes take sizes, lengths and vocabulary from the checkpoint.
    if mode == "train" or "sizes/tiny" in files:
        arguments += TINY
    if mode == "train":
        arguments = [*arguments[:2], LENGTHS, *arguments[2:]]
    return command_line.main(arguments)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a corpus and questions, passages and retrieved files made by the command."""
    folder = tmp_path_factory.mktemp("work")
    words = ("red", "green", "blue", "black", "white", "grey")
    corpus = [{"id": i, "title": word, "text": f"{word} thing"} for i, word in enumerate(words)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in corpus))
    (folder / "questions").mkdir()
    for task in TASKS:
        for split in ("train", "dev", "test"):
            lines = [
                {
                    "id": f"{task}/{split}/{i}",
                    "input": f"{words[i % 6]} thing",
                    "output": [{"answer": words[i % 6], "provenance": [{"title": words[i % 6]}]}],
                }
                for i in range(10)
            ]
            path = folder / "questions" / f"{task}-{split}.jsonl"
            path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    passages = str(folder / "passages")
    corpus_path = str(folder / "corpus.jsonl")
    assert (
        run(
            "passages",
            "runs/passages",
            CORPUS=corpus_path,
            PASSAGES_DIR=passages,
            MAX_PASSAGE_TOKENS=16,
            VOCABULARY="pydocs",
        )
        == 0
    )
    questions, data = str(folder / "questions" / "*.jsonl"), str(folder / "retrieved")
    assert (
        run(
            "retrieve",
            "runs/retrieve",
            PASSAGES_DIR=passages,
            QUESTIONS=questions,
            DATA_DIR=data,
            NUM_PASSAGES=3,
        )
        == 0
    )
    return folder


def data(work):
    return {"PASSAGES_DIR": str(work / "passages"), "DATA_DIR": str(work / "retrieved")}


def train(work, model_dir, *files, **macros):
    defaults = {"MODEL_DIR": str(model_dir), "TRAIN_STEPS": 5, "BATCH_SIZE": 8, "EVAL_PERIOD": 0}
    # The questions of this test, under their own names.
    quiet = {"BEST_METRIC": None, "LOG_EVERY": 1, "MIXTURE_OR_TASK_NAME": "pydocs"}
    files = files or ("examples/pydocs_glimmer_train",)
    return run("train", *files, **{**defaults, **quiet, **data(work), **macros})


def losses(model_dir):
    lines = (model_dir / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("run")
    assert train(work, model_dir, EVAL_PERIOD=5, BEST_METRIC="mean", EVALUATOR_NUM_EXAMPLES=8) == 0
    return model_dir


def test_training_leaves_checkpoints_config_and_metrics(trained):
    assert (trained / "checkpoints" / "5" / "checksums.json").is_file()
    assert "TRAIN_STEPS = 5" in (trained / "config.gin").read_text()
    assert len(losses(trained)) >= 5
    assert (trained / "spiece.model").read_bytes() == PYDOCS_MODEL.read_bytes()


@pytest.mark.parametrize("form", ["huggingface", "t5x"])
def test_training_starts_from_what_export_has_written(work, trained, tmp_path, capfd, caplog, form):
    caplog.set_level(logging.INFO)
    files = ("sizes/tiny", "models/glimmer", "runs/export")
    exported = str(tmp_path / form)
    out = {"CHECKPOINT_PATH": str(trained), "OUTPUT_PATH": exported, "OUTPUT_FORMAT": form}
    assert run("export", *files, **out) == 0
    assert f"Wrote {exported}: {form}, the parts under" in "".join(capfd.readouterr())
    start = {"INITIAL_CHECKPOINT_PATH": exported, "TRAIN_STEPS": 1}
    assert train(work, tmp_path / "run", **start) == 0
    shown = "".join(capfd.readouterr())
    found = {"huggingface": "a Hugging Face glimmer", "t5x": "a T5X checkpoint"}[form]
    assert f"Parameters: {found} in {exported}" in caplog.text
    assert "INITIAL_CHECKPOINT_PATH" in shown


def test_all_modes_after_training(work, trained, capsys):
    memory, checkpoint = str(work / "memory"), str(trained)
    shared = {"CHECKPOINT_PATH": checkpoint, "PASSAGES_DIR": data(work)["PASSAGES_DIR"]}
    assert (
        run(
            "build_memory",
            "runs/build_memory",
            **shared,
            MEMORY_DIR=memory,
            BATCH_SIZE=2,
        )
        == 0
    )
    answers = {}
    for name, extra in (("tokens", {}), ("memory", {"MEMORY_DIR": memory})):
        out = work / f"out_{name}"
        evaluated = {
            "EVAL_OUTPUT_DIR": str(out),
            "BATCH_SIZE": 8,
            "CANDIDATES": ["red", "blue"],
            **extra,
        }
        files = ("examples/pydocs_eval",)
        assert run("eval", *files, **shared, DATA_DIR=data(work)["DATA_DIR"], **evaluated) == 0
        lines = (out / "predictions-pydocs_which_function.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line) for line in lines]
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["tflop_per_question"] > 0
        assert metrics["pydocs_which_function/n"] == 10
        assert 0 < metrics["pydocs_which_function/retriever_recall_at_1"] <= 1
        assert ("seconds_waiting_for_memory" in metrics) == (name == "memory")
    # The folder of another evaluation.
    taken = {**shared, **evaluated, "DATA_DIR": data(work)["DATA_DIR"], "BATCH_SIZE": 16}
    assert run("eval", "examples/pydocs_eval", **taken) == 2
    message = capsys.readouterr().err
    assert f"EVAL_OUTPUT_DIR: {out} holds" in message and "BATCH_SIZE: 8 -> 16" in message
    assert len(answers["tokens"]) == 10
    for one, other in zip(answers["tokens"], answers["memory"], strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
        assert one["prediction"] in ("red", "blue")
        assert one["answers"] == [one["question"].removesuffix(" thing")]
        assert set(one["passage_titles"]) >= set(one["answers"])

    questions = str(work / "retrieved" / "which_function-test.jsonl")
    predictions = str(work / "answers" / "predictions-which_function-test.jsonl")
    infer = {
        "QUESTIONS": questions,
        "INFER_OUTPUT_DIR": str(work / "answers"),
        "MEMORY_DIR": memory,
        "NUM_KEPT": 1,
    }
    assert run("infer", "examples/pydocs_infer", **shared, **infer) == 0
    record = json.loads(pathlib.Path(predictions).read_text().splitlines()[0])
    assert {one["title"] for one in record["passages"]} >= {"red"}
    assert sum(one["kept"] for one in record["passages"]) == 1

    capsys.readouterr()
    assert run("score", "runs/score", PREDICTIONS=predictions, QUESTIONS=questions) == 0
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "recall_at_1" in shown
    # The same file is a submission to KILT.
    assert record["output"][0]["provenance"][0]["title"] == record["passages"][0]["title"]
    arguments = ["--run_mode=score", f"--gold={questions}", f"--guess={predictions}"]
    assert command_line.main(arguments) == 0
    official = json.loads(capsys.readouterr().out)
    assert set(official["downstream"]["downstream"]) == {"accuracy", "em", "f1", "rougel"}


def test_export_and_another_cut_start_a_run(work, trained, tmp_path):
    path = str(tmp_path / "glimmer.safetensors")
    files = ("sizes/tiny", "models/glimmer", "runs/export")
    assert run("export", *files, CHECKPOINT_PATH=str(trained), OUTPUT_PATH=path, NUM_KEPT=2) == 0
    lumen = ("examples/pydocs_lumen_train",)
    assert train(work, tmp_path / "run", *lumen, INITIAL_CHECKPOINT_PATH=path) == 0


def test_a_question_at_the_prompt(work, trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", iter_lines("blue thing\n\n"))
    shared = {"CHECKPOINT_PATH": str(trained), "PASSAGES_DIR": data(work)["PASSAGES_DIR"]}
    candidates = {"CANDIDATES": ["none of these", "nor this"]}
    assert run("infer", "examples/pydocs_infer", **shared, **candidates) == 0
    shown = capsys.readouterr().out
    assert "log-likelihood" in shown
    assert shown.splitlines()[-4].split("    ")[0] in candidates["CANDIDATES"]
    assert "blue" in shown


def iter_lines(text):
    import io

    return io.StringIO(text)


@pytest.mark.parametrize(
    "ablations",
    [
        *(pytest.param(group, id="-".join(group)) for group in ABLATION_GROUPS),
        *(pytest.param([name], id=name, marks=pytest.mark.slow) for name in ABLATIONS),
    ],
)
def test_ablations_train_for_five_steps(work, tmp_path, ablations):
    files = ("examples/pydocs_glimmer_train", *(f"ablations/{name}" for name in ablations))
    # One task, because reading three takes longer than training.
    macros = {"MIXTURE_OR_TASK_NAME": "pydocs_which_function"}
    if "k" in ablations:
        # The lengths of this test have to come after the file, and its K is what it changes.
        macros["TASK_FEATURE_LENGTHS"] = {"inputs": 24, "targets": 16, "passages": (2, 16)}
        macros["NUM_KEPT"] = 1
    assert train(work, tmp_path, *files, **macros) == 0
    assert len(losses(tmp_path)) >= 5


def test_every_ablation_is_in_a_group():
    assert sorted(name for group in ABLATION_GROUPS for name in group) == ABLATIONS


@pytest.mark.parametrize(
    ("mode", "files", "macros", "message"),
    [
        (
            "passages",
            ["runs/passages"],
            {"CORPUS": "none.jsonl", "PASSAGES_DIR": "p", "VOCABULARY": "pydocs"},
            "none.jsonl",
        ),
        (
            "passages",
            ["runs/passages"],
            {"CORPUS": "none.jsonl", "PASSAGES_DIR": "p"},
            "VOCABULARY is required",
        ),
        (
            "eval",
            ["examples/pydocs_eval"],
            {"CHECKPOINT_PATH": SHIPPED, "PASSAGES_DIR": None},
            "There is nothing to read: set PASSAGES_DIR",
        ),
        (
            "export",
            ["sizes/tiny", "models/fid", "runs/export"],
            {"CHECKPOINT_PATH": "none", "OUTPUT_PATH": "o.safetensors"},
            "CHECKPOINT_PATH: there is no checkpoint none",
        ),
        (
            "infer",
            ["examples/pydocs_infer"],
            {"CHECKPOINT_PATH": SHIPPED, "PASSAGES_DIR": "none"},
            "PASSAGES_DIR: no folder none",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "NUM_KEPT": 11},
            "keeps 11 passages",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "BATCH_SIZE": 9},
            "BATCH_SIZE=9 must be a multiple of 8",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "VOCAB_SIZE": 64},
            "Raise VOCAB_SIZE",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "VOCAB_SIZE": 32128},
            "2048 ids, which fill 2048 rows, but the model's embedding has 32128",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "VOCABULARY": None},
            "VOCABULARY is required",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEP": 5},
            "did you mean TRAIN_STEPS?",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "MEMORY_DIR": "m"},
            "FREEZE_MEMORY = True",
        ),
        (
            "train",
            ["examples/pydocs_glimmer_train"],
            {"MODEL_DIR": "m", "TRAIN_STEPS": 5, "INITIAL_CHECKPOINT_PATH": "none"},
            "INITIAL_CHECKPOINT_PATH: there is no checkpoint none",
        ),
        (
            "build_memory",
            ["sizes/tiny", "models/fid", "runs/build_memory"],
            {"CHECKPOINT_PATH": SHIPPED, "MEMORY_DIR": "m", "PASSAGES_DIR": "p"},
            "memory_layers=0",
        ),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capfd, mode, files, macros, message):
    monkeypatch.chdir(tmp_path)
    assert run(mode, *files, **macros) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("glimmer: ")
    assert message in error
    assert "\n" not in error


def test_an_unknown_task_is_reported_before_data_is_read(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    macros = {"CHECKPOINT_PATH": SHIPPED, "PASSAGES_DIR": "none", "MIXTURE_OR_TASK_NAME": "pydoc"}
    assert run("eval", "examples/pydocs_eval", **macros) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "'pydoc'" in error and "MIXTURE_OR_TASK_NAME" in error


def test_an_invalid_line_and_a_k_that_is_too_large_are_reported(work, tmp_path, capfd):
    folder = tmp_path / "retrieved"
    folder.mkdir()
    for task in TASKS:
        text = (work / "retrieved" / f"{task}-train.jsonl").read_text()
        (folder / f"{task}-train.jsonl").write_text(text + '{"id": 3\n')
    assert train(work, tmp_path / "run", DATA_DIR=str(folder)) == 2
    assert "train.jsonl:11" in capfd.readouterr().err
    lengths = {"inputs": 24, "targets": 16, "passages": (4, 16)}
    assert train(work, tmp_path / "run", TASK_FEATURE_LENGTHS=lengths) == 2
    assert "TASK_FEATURE_LENGTHS has K=4 passages" in capfd.readouterr().err


def test_a_missing_library_is_one_line_with_the_pip_command(monkeypatch, capsys):
    def needs_gin(_):
        raise ModuleNotFoundError("No module named 'gin'", name="gin")

    monkeypatch.setattr(command_line, "run_mode", needs_gin)
    assert command_line.main(["--run_mode=score"]) == 2
    error = capsys.readouterr().err
    assert "gin is not installed" in error and "pip install gin-config" in error
    assert error.count("\n") == 1


def test_help_describes_every_mode_without_heavy_imports():
    code = """if True:
        import contextlib, io, sys
        from glimmer_jax import main
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main.parse_flags(["--help"])
        for name, mode in main.MODES.items():
            assert f"  {name} " in text.getvalue() and mode.gin_file in text.getvalue(), name
        heavy = {"jax", "flax", "numpy", "gin", "tensorflow", "seqio"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_unknown_arguments_are_rejected(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.parse_flags(["--gin_fil=x"])
    assert caught.value.code == 2
    assert "bindings are written --gin.NAME=VALUE" in capsys.readouterr().err


def kilt_file(path, answer, page):
    output = [{"answer": answer, "provenance": [{"wikipedia_id": page}]}]
    path.write_text(json.dumps({"id": "q", "input": "?", "output": output}) + "\n")
    return path


def test_official_scores_are_printed_as_json(tmp_path, capsys):
    gold = kilt_file(tmp_path / "gold", "Jane Austen", "7")
    guess = kilt_file(tmp_path / "guess", "jane austen", 7)
    files = ["--run_mode=score", f"--gold={gold}", f"--guess={guess}"]
    assert command_line.main([*files, "--ks=2,1"]) == 0
    found = json.loads(capsys.readouterr().out)
    rouge = pytest.approx(0.0)
    assert found["downstream"] == {
        "downstream": {"accuracy": 0.0, "em": 1.0, "f1": 1.0, "rougel": rouge},
        "kilt": {"KILT-accuracy": 0.0, "KILT-em": 1.0, "KILT-f1": 1.0, "KILT-rougel": rouge},
        "retrieval": {"Rprec": 1.0, "recall@5": 1.0},
    }
    pages = {"Rprec": 1.0, "precision@1": 1.0, "precision@2": 0.5}
    assert found["retrieval"] == {**pages, "recall@2": 1.0, "success_rate@2": 1.0}
    assert command_line.main(files) == 0
    assert "recall@20" in json.loads(capsys.readouterr().out)["retrieval"]


def test_official_scores_report_invalid_files(tmp_path, capfd):
    gold = kilt_file(tmp_path / "gold", "x", "7")
    guess = kilt_file(tmp_path / "guess", "x", "7")
    guess.write_text(guess.read_text() + '{"id": 3\n')
    for path, message in (
        (guess, "guess:2: not a JSON object"),
        (tmp_path / "none", "--guess: there is no file"),
    ):
        flags = ["--run_mode=score", f"--gold={gold}", f"--guess={path}"]
        assert command_line.main(flags) == 2
        seen = capfd.readouterr()
        assert message in seen.err and not seen.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run_mode=score", "--gold=g"], "need --run_mode=score and both files"),
        (["--run_mode=score", "--ks=1"], "need --run_mode=score and both files"),
        (["--gold=g", "--guess=p"], "need --run_mode=score and both files"),
        (["--run_mode=score", "--gold=g", "--guess=p", "--gin.X=1"], "take no gin"),
        (
            ["--run_mode=score", "--gold=g", "--guess=p", "--ks=1,x"],
            "--ks: must be numbers such as 1,5,10, got '1,x'",
        ),
    ],
)
def test_flags_of_official_scores_go_together(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        command_line.parse_flags(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_invalid_input_exits_with_2_and_has_a_traceback_with_debug(tmp_path):
    command = [sys.executable, "-m", "glimmer_jax.main", "--run_mode=score"]
    command += ["--gin_file=gin/runs/score.gin", "--gin.PREDICTIONS='x'", "--gin.QUESTIONS='y'"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def outcome(*extra):
        return subprocess.run(
            [*command, *extra], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    plain, debug = outcome(), outcome("--debug")
    assert (plain.returncode, debug.returncode) == (2, 2)
    assert plain.stderr.strip() == "glimmer: PREDICTIONS: there is no file x. Check the path."
    assert "Traceback" in debug.stderr


def test_a_bug_exits_with_1_and_asks_for_a_report(tmp_path):
    script = """
import glimmer_jax.main as command_line
def run_mode(flags):
    print("\\udcff")  # a file name that is not UTF-8
    raise KeyError("missing")
command_line.run_mode = run_mode
command_line.run()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, "--run_mode=score"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and ended.stdout == "\\udcff\n"
    assert "KeyError: 'missing'" in ended.stderr and "Please report it" in ended.stderr


def test_an_error_inside_a_library_is_not_invalid_input(monkeypatch):
    def broken(*_):
        import numpy as np

        np.reshape(np.zeros(3), (2, 2))

    monkeypatch.setattr(command_line, "run_mode", broken)
    with pytest.raises(ValueError, match="cannot reshape"):
        command_line.main(["--run_mode=score"])


def test_storage_timeouts_exit_with_the_retry_code(monkeypatch, capsys):
    def broken(_):
        error = ValueError("UNAVAILABLE: did not answer")
        raise storage_error("gs://bucket/memory/", error) from error

    monkeypatch.setattr(command_line, "run_mode", broken)
    assert command_line.main(["--run_mode=score"]) == 42
    assert "did not answer" in capsys.readouterr().err


def full_disk():
    """As Orbax raises it: the first error is known by its number, which the second has not."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise RuntimeError("the save failed") from error


def library(kind, message):
    def raise_it():
        # Of no module of ours.
        exec("raise kind(message)", {"__name__": "library", "kind": kind, "message": message})

    return raise_it


def refused_to_our_own_reader():
    try:
        raise ValueError("PERMISSION_DENIED: Error reading gs://b/m: [HTTP code 403]")
    except ValueError as error:
        raise storage_error("gs://b/m", error) from error


def bug_after_storage():
    try:
        raise TimeoutError("handled")
    except TimeoutError:
        raise KeyError("a bug") from None


def broken_pipe():
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def connection_reset():
    raise OSError(errno.ECONNRESET, "by peer")


class DataLossError(Exception):
    """As TensorFlow names what it cannot decode."""


class UnavailableError(Exception):
    """Named as TensorFlow's."""


@pytest.mark.parametrize(
    "broken, code, said",
    [
        (
            full_disk,
            2,
            "The storage is full: [Errno 28] No space left on device. What was finished",
        ),
        (
            library(ValueError, "RESOURCE_EXHAUSTED: writing 'a': No space left on device"),
            2,
            "Make room, and run the same command again",
        ),
        (
            library(ValueError, "UNAVAILABLE: Error writing gs://bucket/run/7: 503"),
            42,
            "The storage did not answer: UNAVAILABLE: Error writing gs://bucket/run/7",
        ),
        (refused_to_our_own_reader, 2, "gs://b/m could not be read or written: PERMISSION_DENIED"),
        (library(UnavailableError, "libcurl code 6"), 42, "libcurl code 6"),
        (library(DataLossError, "corrupted record at 0"), 2, "A file is damaged: corrupted record"),
        (
            library(jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED: Out of memory allocating 9"),
            2,
            "too little memory: RESOURCE_EXHAUSTED: Out of memory allocating 9. Lower BATCH_SIZE",
        ),
        (library(MemoryError, "9 TiB"), 2, "This machine has too little memory: 9 TiB."),
        (connection_reset, 42, "The storage did not answer: [Errno 104] by peer"),
        (
            library(ValueError, "PERMISSION_DENIED: gs://bucket/run: 403"),
            2,
            "The storage denied access: PERMISSION_DENIED: gs://bucket/run: 403 Check permissions",
        ),
    ],
)
def test_storage_errors_in_libraries_are_not_reported_as_bugs(
    monkeypatch, capsys, broken, code, said
):
    monkeypatch.setattr(command_line, "run_mode", lambda _: broken())
    assert command_line.main(["--run_mode=score"]) == code
    assert said in capsys.readouterr().err


def test_work_of_one_process_is_not_done_by_a_job_of_many(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(command_line, "run_mode", lambda _: None)
    assert command_line.main(["--run_mode=export"]) == 2
    assert (
        "--run_mode=export is a single-process mode, but this job has 4" in capsys.readouterr().err
    )
    assert command_line.main(["--run_mode=eval"]) == 0


@pytest.mark.parametrize(
    "broken, kind",
    [
        (library(jax.errors.JaxRuntimeError, "UNAVAILABLE: lost"), jax.errors.JaxRuntimeError),
        (bug_after_storage, KeyError),
        (broken_pipe, BrokenPipeError),
    ],
)
def test_what_is_not_the_storages_comes_up_as_it_is(monkeypatch, broken, kind):
    monkeypatch.setattr(command_line, "run_mode", lambda _: broken())
    with pytest.raises(kind):
        command_line.main(["--run_mode=score"])


def test_a_stop_ends_with_42_and_finished_work_with_0(monkeypatch, capsys):
    def stop(poll):
        os.kill(os.getpid(), 15)
        if poll:
            STOP.poll()

    for poll, code in ((True, 42), (False, 0)):
        monkeypatch.setattr(command_line, "run_mode", lambda _, poll=poll: stop(poll))
        assert command_line.main(["--run_mode=score"]) == code
        assert ("Stopped by SIGTERM" in capsys.readouterr().err) == (code == 42)
