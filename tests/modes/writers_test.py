"""Two commands that write the same output: the second is rejected, and the first is named."""

import json
import os
import re

import jax
import pytest

from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.modes import checks
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
from glimmer_jax.storage.lease import output_lock
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

GLIMMER = tiny.GLIMMER.with_t5(vocab_size=2048)
LENGTHS = {"inputs": 8, "targets": 4, "passages": (2, 8)}

QUESTION = {"id": "q", "input": "a?", "output": [{"answer": "b"}], "retrieved": [{"id": 1}]}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A corpus, its passages, a file of questions, and a model."""
    place, text = tmp_path_factory.mktemp("work"), Vocabulary("pydocs")
    record = {"id": 1, "title": "a", "text": "b"}
    (place / "corpus.jsonl").write_text(json.dumps(record))
    (place / "questions").mkdir()
    (place / "questions" / "nq-dev.jsonl").write_text(json.dumps(QUESTION))
    sizes = {"fingerprint": text.fingerprint, "max_length": 8, "vocab_size": text.vocab_size}
    write_passages(place / "passages", [record], text.encode, **sizes)
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
    take = checks.lease.output_lock

    def late(path, inside):
        os.makedirs(os.path.dirname(appearing), exist_ok=True)
        with open(appearing, "w") as file:
            file.write("precious")
        return take(path, inside)

    monkeypatch.setattr(checks.lease, "output_lock", late)
    with pytest.raises(ValueError, match=r"exists.*OVERWRITE=True"):
        function(*arguments)
    with open(appearing) as file:
        assert file.read() == "precious"


@pytest.mark.parametrize("mode", ["retrieve", "export", "export a file", "infer"])
def test_nothing_is_written_after_another_writer_took_over(work, tmp_path, monkeypatch, mode):
    function, arguments, *_ = command(mode, work, str(tmp_path / "result"))

    def lost(lock):
        raise ValueError("taken over")

    monkeypatch.setattr(checks.lease.WriterLock, "check", lost)
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
    with checks.sole_writer(None) as check_lock:
        check_lock()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with checks.sole_writer(str(tmp_path / "out")) as check_lock:
        check_lock()
    assert not list(tmp_path.iterdir())


def test_scores_are_not_replaced(tmp_path):
    output = tmp_path / "scores.json"
    output.write_text("precious")
    with pytest.raises(ValueError, match=f"OUTPUT_PATH: {output} exists.*OVERWRITE=True"):
        score("missing.jsonl", "missing.jsonl", str(output))
    assert output.read_text() == "precious"
