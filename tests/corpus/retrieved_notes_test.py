import os

import pytest

from glimmer_jax.corpus import retrieved_notes
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages


def passages(folder, text="one", max_length=9):
    record = {"id": 1, "title": "t", "text": text}
    encode = lambda words: [2] * len(words.split())  # noqa: E731
    write_passages(folder, [record], encode, "f", max_length, vocab_size=9)
    return Passages.open(folder)


def write_note(path, passages, request):
    retrieved_notes.write_note(path, path, passages, request)


def test_a_file_belongs_to_its_corpus_however_that_is_tokenised(tmp_path):
    mine, other = passages(tmp_path / "mine"), passages(tmp_path / "other", "two")
    shorter = passages(tmp_path / "shorter", max_length=3)
    data = tmp_path / "data"
    data.mkdir()
    write_note(data / "nq-dev.jsonl", mine, {"k": 1})
    for place in (data, data / "nq-dev.jsonl", f"file://{data}", f"file://{data}/nq-dev.jsonl"):
        retrieved_notes.check(place, mine)
        retrieved_notes.check(place, shorter)
        with pytest.raises(ValueError, match="data/nq-dev.jsonl .*mine"):
            retrieved_notes.check(place, other)
    with pytest.raises(ValueError, match="data/nq-dev.jsonl .*mine"):
        retrieved_notes.check(data / "nq-dev.jsonl.gz", other)
    # As it is with the file itself there, in a folder that has others, and a dot in its name.
    (data / "nq-dev.jsonl").write_text("{}")
    (data / "below").mkdir(mode=0)
    dotted = tmp_path / "data.v2"
    data.rename(dotted)
    for place in (dotted, dotted / "nq-dev.jsonl"):
        with pytest.raises(ValueError, match="data.v2/nq-dev.jsonl "):
            retrieved_notes.check(place, other)
    data = dotted
    # Files without a note are taken as they are.
    retrieved_notes.check(data / "nq-train.jsonl", other)
    retrieved_notes.check(tmp_path / "nowhere", other)


def test_a_note_is_replaced_and_not_written_over(tmp_path):
    note, before = tmp_path / "nq-dev.passages.json", tmp_path / "before"
    for text in ("one", "two"):
        write_note(tmp_path / "nq-dev.jsonl", passages(tmp_path / text, text), {})
        if not before.exists():
            os.link(note, before)
    assert before.read_text() != note.read_text()
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_note_knows_the_request_of_its_file(tmp_path):
    path = tmp_path / "nq-dev.jsonl"
    assert not retrieved_notes.answers_request(path, {"k": 5})
    path.write_text("{}\n")
    write_note(path, passages(tmp_path / "p"), {"k": 5})
    assert retrieved_notes.answers_request(path, {"k": 5})
    assert not retrieved_notes.answers_request(path, {"k": 6})


def test_a_file_that_is_not_the_notes_is_not_kept_and_not_read(tmp_path):
    path, mine = tmp_path / "nq-dev.jsonl", passages(tmp_path / "p")
    path.write_text("{}\n{}\n")
    write_note(path, mine, {"k": 5})

    def check():
        retrieved_notes.check_content(path, path, retrieved_notes.file_sha256(path))

    assert retrieved_notes.answers_request(path, {"k": 5})
    check()
    for text in ("{}\n[]\n", "{}\n"):
        path.write_text(text)
        assert not retrieved_notes.answers_request(path, {"k": 5})
        with pytest.raises(ValueError, match="nq-dev.jsonl is not .*SHA-256.*remove nq-dev.p"):
            check()
    # Its note describes the file before it was compressed.
    assert retrieved_notes.file_sha256(f"{path}.gz") is None
    (tmp_path / "nq-dev.passages.json").unlink()
    check()
