"""Two commands that write the same output: the second is rejected, and names the first."""

import os

import pytest

from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.modes import checks
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.modes.export import export
from glimmer_jax.modes.passages import passages
from glimmer_jax.modes.retrieve import retrieve
from glimmer_jax.modes.score import score
from glimmer_jax.storage.lease import output_lock
from glimmer_jax.vocabulary import Vocabulary


@pytest.fixture
def corpus(tmp_path):
    """A corpus, its passages, and a file of questions."""
    (tmp_path / "corpus.jsonl").write_text('{"id": 1, "title": "a", "text": "b"}\n')
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "nq-dev.jsonl").write_text(
        '{"id": "q", "input": "a?", "output": [{"answer": "b"}]}\n'
    )
    text = Vocabulary("pydocs")
    record = {"id": 1, "title": "a", "text": "b"}
    write_passages(
        tmp_path / "passages", [record], text.encode, text.fingerprint, 8, vocab_size=2048
    )
    return tmp_path


def commands(work, output):
    return {
        "passages": lambda: passages(str(work / "corpus.jsonl"), output, 8, "pydocs"),
        "retrieve": lambda: retrieve(
            str(work / "passages"), str(work / "questions" / "*.jsonl"), output, 1
        ),
        "export": lambda: export(CheckpointConfig(str(work / "missing")), output),
    }


@pytest.mark.parametrize("mode", ["passages", "retrieve", "export"])
def test_a_second_writer_is_rejected(corpus, mode):
    output = corpus / "out" / "result"
    with output_lock(output):
        with pytest.raises(ValueError, match=f"/out/.*written by process {os.getpid()} on"):
            commands(corpus, str(output))[mode]()
        assert not output.exists()


@pytest.mark.parametrize("mode", ["passages", "retrieve"])
def test_the_lock_of_an_output_is_removed_with_the_work(corpus, mode):
    output = corpus / "out" / "result"
    commands(corpus, str(output))[mode]()
    assert [path.name for path in output.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("url", ["memory://models/t5/", "memory://models"])
def test_an_output_in_a_bucket_is_locked_there(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with output_lock(url):
        assert not list(tmp_path.iterdir())


def test_what_is_not_written_is_not_locked():
    with checks.sole_writer(None):
        pass


def test_scores_are_not_replaced(tmp_path):
    output = tmp_path / "scores.json"
    output.write_text("precious")
    with pytest.raises(ValueError, match=f"OUTPUT_PATH: {output} exists.*OVERWRITE=True"):
        score("missing.jsonl", "missing.jsonl", str(output))
    assert output.read_text() == "precious"
