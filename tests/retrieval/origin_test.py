import pytest

from glimmer_jax.passages import Passages, write_passages
from glimmer_jax.retrieval import origin


def passages(folder, text="one", max_length=9):
    record = {"id": 1, "title": "t", "text": text}
    encode = lambda words: [2] * len(words.split())  # noqa: E731
    write_passages(folder, [record], encode, "f", max_length, vocab_size=9)
    return Passages.open(folder)


def test_a_file_belongs_to_its_corpus_however_that_is_tokenised(tmp_path):
    mine, other = passages(tmp_path / "mine"), passages(tmp_path / "other", "two")
    shorter = passages(tmp_path / "shorter", max_length=3)
    data = tmp_path / "data"
    data.mkdir()
    origin.note(data / "nq-dev.jsonl", mine)
    for place in (data, data / "nq-dev.jsonl"):
        origin.check(place, mine)
        origin.check(place, shorter)
        with pytest.raises(
            ValueError, match="nq-dev.jsonl of .*data was retrieved from .*mine, and"
        ):
            origin.check(place, other)
    # Files without a note are taken as they are.
    origin.check(data / "nq-train.jsonl", other)
    origin.check(tmp_path / "nowhere", other)
