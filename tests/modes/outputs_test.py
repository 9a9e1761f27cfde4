"""Outputs: a second writer is rejected, and a restarted command recognises its own."""

import errno
import json
import os
import re
import subprocess

import jax
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.modes import outputs
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.modes.codebooks import learn_codebooks
from glimmer_jax.modes.evaluate import evaluate
from glimmer_jax.modes.export import export
from glimmer_jax.modes.infer import infer
from glimmer_jax.modes.passages import passages
from glimmer_jax.modes.retrieve import retrieve
from glimmer_jax.modes.score import score
from glimmer_jax.modes.settings import (
    AnsweringConfig,
    CorpusConfig,
    DatasetConfig,
    EncoderConfig,
)
from glimmer_jax.runtime.preemption import StopRequested
from glimmer_jax.serving.stablehlo import ProgramConfig
from glimmer_jax.storage.lease import output_lock
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

SAVED = """\
import something

# Macros:
# ==============================================================================
EVAL_OUTPUT_DIR = 'a'
LEARNING_RATE = 0.001
QUESTIONS = \\
    {'a': 1,
     'b': 2}

# Parameters for evaluate.evaluate:
# ==============================================================================
evaluate.evaluate.num_examples = 10
"""

GLIMMER = tiny.GLIMMER.with_t5(vocab_size=2048)
LENGTHS = {"inputs": 8, "targets": 4, "passages": (2, 8)}
PROGRAM = ProgramConfig([LENGTHS], from_memory=False, platforms=["cpu"])

QUESTION = {"id": "q", "input": "a?", "output": [{"answer": "b"}], "retrieved": [{"id": 1}]}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A corpus, its passages, a file of questions, and a model."""
    place, text = tmp_path_factory.mktemp("work"), Vocabulary("pydocs")
    # As many tokens as codebooks have codes.
    records = [{"id": i, "title": f"a{i}", "text": "b c d e f g"} for i in range(1, 81)]
    (place / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "questions").mkdir()
    (place / "questions" / "nq-dev.jsonl").write_text(json.dumps(QUESTION))
    sizes = {"fingerprint": text.fingerprint, "max_length": 8, "vocab_size": text.vocab_size}
    write_passages(place / "passages", records, text.encode, **sizes)
    described = describe(GLIMMER, text.fingerprint, LENGTHS)
    save_params_file(place / "model.safetensors", tiny.params(GLIMMER), described)
    return place


def command(mode, work, output):
    """A call of a mode, and the output that it locks: a path, and whether it is a folder in place."""
    model, corpus = str(work / "model.safetensors"), str(work / "passages")
    questions = str(work / "questions" / "nq-dev.jsonl")
    reader, read = AnsweringConfig(model), CorpusConfig(corpus)
    encoder = EncoderConfig(model, memory_codec="pq", passages_dir=corpus)
    file, predictions = f"{output}.safetensors", f"{output}/predictions-nq-dev.jsonl"
    calls = {
        "passages": (passages, str(work / "corpus.jsonl"), output, 8, "pydocs"),
        "retrieve": (retrieve, corpus, questions, output, 1),
        "export": (export, CheckpointConfig(model), output),
        "export a file": (export, CheckpointConfig(model), file),
        "export programs": (export, CheckpointConfig(model), output, "huggingface", PROGRAM),
        "codebooks": (learn_codebooks, encoder, file),
        "infer": (infer, reader, None, 8, read, questions, output),
        "eval": (evaluate, reader, DatasetConfig("nq", None, 8, "test"), read, None, output),
    }
    locked = {"export a file": file, "codebooks": file, "infer": predictions}
    function, *arguments = calls[mode]
    return function, arguments, locked.get(mode, output), mode in ("retrieve", "export", "eval")


MODES = ("passages", "retrieve", "export", "export a file", "codebooks", "infer", "eval")


@pytest.mark.parametrize("mode", MODES)
def test_a_second_writer_is_rejected(work, tmp_path, mode):
    function, arguments, locked, in_place = command(mode, work, str(tmp_path / "out" / "result"))
    with output_lock(locked, in_place):
        message = f"^{re.escape(locked)} is being written by process {os.getpid()} on"
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not files


@pytest.mark.parametrize("mode", ["passages", "retrieve", "export", "export a file", "infer"])
def test_the_lock_of_an_output_is_removed_with_the_work(work, tmp_path, mode):
    function, arguments, locked, _ = command(mode, work, str(tmp_path / "out" / "result"))
    function(*arguments)
    assert os.path.exists(locked)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".lock")]


@pytest.mark.parametrize("mode", ["export a file", "codebooks", "infer"])
def test_a_file_that_appears_meanwhile_is_not_replaced(work, tmp_path, monkeypatch, mode):
    function, arguments, locked, _ = command(mode, work, str(tmp_path / "result"))
    appearing = locked.replace(".safetensors", ".json")
    take = outputs.lease.output_lock

    def late(path, inside, about=None):
        os.makedirs(os.path.dirname(appearing), exist_ok=True)
        with open(appearing, "w") as file:
            file.write("precious")
        return take(path, inside, about)

    monkeypatch.setattr(outputs.lease, "output_lock", late)
    with pytest.raises(ValueError, match=r"exists.*OVERWRITE=True"):
        function(*arguments)
    with open(appearing) as file:
        assert file.read() == "precious"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eval"])
def test_nothing_is_written_after_another_writer_took_over(work, tmp_path, monkeypatch, mode):
    function, arguments, *_ = command(mode, work, str(tmp_path / "result"))

    def lost(lock):
        raise ValueError("taken over")

    monkeypatch.setattr(outputs.lease.WriterLock, "check", lost)
    with pytest.raises(ValueError, match="taken over"):
        function(*arguments)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_output_that_cannot_be_in_a_bucket_is_not_locked_there(work):
    with pytest.raises(ValueError, match="PASSAGES_DIR is written to a local disk"):
        passages(str(work / "corpus.jsonl"), "gs://nobody/passages", 8, "pydocs")


@pytest.mark.parametrize(
    "path, inside, name", [("t5/", True, ".lock"), ("a.safetensors", False, ".a.safetensors.lock")]
)
def test_a_lock_is_a_file_inside_a_folder_or_beside_a_file(tmp_path, path, inside, name):
    with output_lock(f"file://{tmp_path}/{path}", inside):
        (lock,) = (found for found in tmp_path.rglob("*") if found.is_file())
        assert lock.name == name


def test_only_process_0_locks_and_no_output_is_not_locked(tmp_path, monkeypatch):
    with outputs.locked(None) as check_lock:
        check_lock()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with outputs.locked(str(tmp_path / "out")) as check_lock:
        check_lock()
    assert not list(tmp_path.iterdir())


def test_scores_are_replaced_only_if_they_may_be(work, tmp_path):
    output, predictions = tmp_path / "scores.json", tmp_path / "predictions.jsonl"
    predictions.write_text(json.dumps({"id": "q", "prediction": "b"}))
    arguments = (str(predictions), str(work / "questions" / "nq-dev.jsonl"), str(output))
    score(*arguments)
    written = output.stat().st_mtime_ns
    score(*arguments)  # what it would write is there
    assert output.stat().st_mtime_ns == written
    output.write_text("precious")
    with pytest.raises(ValueError, match=f"OUTPUT_PATH: {output} exists.*OVERWRITE=True"):
        score(*arguments)
    assert output.read_text() == "precious"
    score(*arguments, overwrite=True)
    assert json.loads(output.read_text())["exact_match"]["mean"] == 1.0


def leave_lock(path, in_place, about, command="ours"):
    """The lock file of a killed process."""
    with output_lock(path, in_place, about) as lock:
        lock.abandon()
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = (
        os.path.join(path, ".lock")
        if in_place
        else os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")
    )
    with open(name) as file:
        fields = json.load(file)
    del fields["ended"]
    with open(name, "w") as file:
        json.dump({**fields, "pid": dead.pid, "command": command}, file)


def last_of(output):
    """The file that completes an output."""
    for name in ("manifest.json", "config.json"):
        if os.path.exists(os.path.join(output, name)):
            return os.path.join(output, name)
    return output.replace(".safetensors", ".json")


OURS = {"before": None}
COMPLETED = ("passages", "export", "export a file", "export programs", "codebooks", "infer")


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.setattr(outputs.lease, "command", lambda: "ours")


@pytest.mark.parametrize("mode", COMPLETED)
def test_a_restarted_command_keeps_what_it_completed(work, tmp_path, ours, capsys, mode):
    function, arguments, locked, in_place = command(mode, work, str(tmp_path / "result"))
    function(*arguments)
    last = last_of(locked)
    written = os.stat(last)
    # Killed between the last rename and the removal of the lock; then again, after it was restarted.
    for _ in range(2):
        leave_lock(locked, in_place, OURS)
        capsys.readouterr()
        function(*arguments)
        assert f"{locked} is complete and kept" in capsys.readouterr().out
        assert os.stat(last) == written
        assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".lock")]
    for other in ("another", None):
        leave_lock(locked, in_place, OURS, other)
        with pytest.raises(ValueError, match=r"exists|holds"):
            function(*arguments)
    assert os.stat(last) == written


@pytest.mark.parametrize("mode", ["passages", "export a file", "infer"])
def test_an_output_that_was_to_be_replaced_is_not_taken_for_the_new_one(
    work, tmp_path, ours, capsys, mode
):
    function, arguments, locked, in_place = command(mode, work, str(tmp_path / "result"))
    function(*arguments)
    last = last_of(locked)
    before = os.stat(last)
    # An attempt with OVERWRITE=True was killed before it replaced the file, and is restarted.
    leave_lock(locked, in_place, {"before": outputs._identity(last)})
    capsys.readouterr()
    function(*arguments, overwrite=True)
    assert "complete and kept" not in capsys.readouterr().out
    assert os.stat(last).st_mtime_ns > before.st_mtime_ns


def place_of(path, check=lambda: None):
    return outputs.Place(str(path), str(path), check)


def test_a_stop_after_the_output_leaves_the_lock_for_the_restart(tmp_path, ours):
    path, lock = tmp_path / "out", tmp_path / ".out.lock"
    with pytest.raises(StopRequested), outputs.sole_writer(place_of(path)):
        raise StopRequested("before anything is written")
    assert not lock.exists()

    def stopped_late():
        with outputs.sole_writer(place_of(path)):
            path.write_text("complete")
            raise StopRequested("while old files are removed")

    with pytest.raises(StopRequested):
        stopped_late()
    assert json.loads(lock.read_text())["about"] == OURS

    def taken():
        raise ValueError("exists")

    # This process still lives, but does not write any more.
    place_of(path, taken).check_early()
    with outputs.sole_writer(place_of(path, taken)) as held:
        assert held.complete
    assert not lock.exists()
    with pytest.raises(ValueError, match="exists"):
        place_of(path, taken).check_early()
    with pytest.raises(ValueError, match="exists"), outputs.sole_writer(place_of(path, taken)):
        pass


def test_storage_that_fails_as_well_hides_no_error(tmp_path, ours, monkeypatch):
    lock = tmp_path / ".out.lock"

    def fail(path):
        raise OSError(errno.ETIMEDOUT, "timed out")

    def stopped():
        with outputs.sole_writer(place_of(tmp_path / "out")):
            monkeypatch.setattr(outputs, "_identity", fail)
            raise StopRequested("the first error")

    with pytest.raises(StopRequested, match="the first error"):
        stopped()
    # The output may be complete.
    assert json.loads(lock.read_text())["ended"] is True


@pytest.mark.parametrize("state", range(4))
def test_all_processes_follow_process_0(tmp_path, monkeypatch, state):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(outputs.multihost_utils, "broadcast_one_to_all", lambda own: state)

    def check():
        raise AssertionError("process 0 looks")

    writer = outputs.sole_writer(place_of(tmp_path / "out", check))
    if state == outputs._REJECTED:
        with pytest.raises(ValueError, match="rejected by process 0"), writer:
            pass
    elif state == outputs._UNREACHABLE:
        with pytest.raises(StopRequested, match="Process 0 could not reach"), writer:
            pass
    else:
        with writer as held:
            held.check_lock()
            assert held.complete == (state == outputs._COMPLETE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, state",
    [
        (ValueError("exists"), outputs._REJECTED),
        (OSError(errno.EACCES, "denied"), outputs._REJECTED),
        (OSError(errno.ETIMEDOUT, "timed out"), outputs._UNREACHABLE),
        (None, outputs._FREE),
    ],
)
@pytest.mark.parametrize("where", ["check", "lock"])
def test_process_0_tells_the_others_what_it_found(tmp_path, monkeypatch, where, error, state):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        outputs.multihost_utils, "broadcast_one_to_all", lambda own: told.append(int(own)) or own
    )

    def failing(*_):
        if error is not None:
            raise error

    if where == "lock":
        enter = outputs.lease.WriterLock.__enter__
        monkeypatch.setattr(
            outputs.lease.WriterLock, "__enter__", lambda lock: failing() or enter(lock)
        )
    writer = outputs.sole_writer(place_of(tmp_path / "out", failing if where == "check" else str))
    if error is None:
        with writer:
            pass
    else:
        with pytest.raises(type(error), match=str(error.args[-1])), writer:
            pass
    assert told == [state]
    assert not list(tmp_path.iterdir())


def test_a_command_is_its_settings_and_not_its_job(tmp_path):
    def named(*flags):
        given = ["--gin_file=gin/runs/score.gin", "--gin.PREDICTIONS='missing'", *flags]
        given += ["--gin.QUESTIONS='missing'"]
        with pytest.raises(ValueError, match="PREDICTIONS: there is no file"):
            command_line.run_mode(command_line.parse_flags(["--run_mode=score", *given]))
        return outputs.lease.command()

    first = named()
    assert named("--process_id=1", "--num_processes=2", "--debug") == first
    assert named("--gin.OUTPUT_PATH='b'") != first
    # The content of a gin file counts, not its name.
    for name, text in (
        ("a", "OUTPUT_PATH = 'c'"),
        ("b", "OUTPUT_PATH = 'c'"),
        ("c", "OUTPUT_PATH = 'd'"),
    ):
        (tmp_path / f"{name}.gin").write_text(text)
    a, b, c = (named(f"--gin_file={tmp_path}/{name}.gin") for name in "abc")
    assert a == b != c


def test_without_a_known_command_no_output_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs.lease, "_command", None)
    (tmp_path / "out").touch()
    leave_lock(str(tmp_path / "out"), False, OURS, None)

    def taken():
        raise ValueError("exists")

    with pytest.raises(ValueError, match="exists"):
        place_of(tmp_path / "out", taken).check_early()


def test_a_file_in_place_of_an_output_folder_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="INFER_OUTPUT_DIR: .*out is a file"):
        outputs.replaceable("INFER_OUTPUT_DIR", str(tmp_path / "out" / "a.jsonl"), False)


def changed(tmp_path, *replacements):
    (tmp_path / "config.gin").write_text(SAVED)
    text = SAVED
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return outputs.changed_settings(str(tmp_path), text)


def test_every_changed_added_and_removed_binding_is_named(tmp_path):
    assert changed(
        tmp_path,
        ("0.001", "0.0002"),
        ("'b': 2", "'b': 3"),
        ("evaluate.evaluate.num_examples = 10", "evaluate.evaluate.seed = 0"),
    ) == [
        "LEARNING_RATE: 0.001 -> 0.0002",
        "QUESTIONS: {'a': 1, 'b': 2} -> {'a': 1, 'b': 3}",
        "evaluate.evaluate.num_examples: 10 -> unset",
        "evaluate.evaluate.seed: unset -> 0",
    ]


def test_another_layout_or_place_is_no_change(tmp_path):
    moved = ("EVAL_OUTPUT_DIR = 'a'", "EVAL_OUTPUT_DIR = 'b'")
    wrapped = ("LEARNING_RATE = 0.001", "LEARNING_RATE = \\\n    0.001")
    assert changed(tmp_path, moved, wrapped, ("import something", "import other")) == []


def test_nothing_has_changed_in_a_new_folder_or_without_gin(tmp_path):
    assert outputs.changed_settings(str(tmp_path / "new"), SAVED) == []
    (tmp_path / "config.gin").write_text(SAVED)
    assert outputs.changed_settings(str(tmp_path), "") == []
