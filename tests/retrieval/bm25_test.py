import json
import sys

import numpy as np
import pytest

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.retrieval import bm25
from glimmer_jax.retrieval.bm25 import Bm25, Bm25Config, Bm25Retriever
from glimmer_jax.retrieval.retriever import rows_of_split

RECORDS = [
    {"id": 11, "title": "zoo.apes", "text": "apes eat fruit", "page": "p", "chunk": 0},
    {"id": 12, "title": "zoo.fish", "text": "fish eat worms", "page": "q", "chunk": 0},
    {"id": 13, "title": "zoo.fish", "text": "fish swim in water", "page": "q", "chunk": 1},
    {"id": 14, "title": "bus", "text": "wheels on the bus", "page": "r", "chunk": 0},
]
SPLITS = ("train", "train", "test", "test")


@pytest.fixture
def folder(tmp_path):
    records = [{**record, "split": s} for record, s in zip(RECORDS, SPLITS, strict=True)]
    write_passages(
        tmp_path / "passages", records, lambda text: list(text.encode()), "f", 99, vocab_size=256
    )
    (tmp_path / "questions").mkdir()
    for split in ("train", "test"):
        rows = [
            example("1", "who swim in fish water", "q", 1),
            example("2", "what do apes eat", "p", 0),
        ]
        path = tmp_path / "questions" / f"task-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def example(name, question, page, chunk):
    provenance = [{"wikipedia_id": page, "start_paragraph_id": chunk}]
    return {"id": name, "input": question, "output": [{"answer": "", "provenance": provenance}]}


def test_the_best_passage_comes_first_and_strangers_not_at_all():
    index = Bm25(RECORDS)
    (found,) = index.search(["fish worms"], 4)
    assert [row for row, _ in found] == [1, 2]
    assert found[0][1] > found[1][1] > 0
    assert index.search(["quark", "", "zoo.fish"], 1)[:2] == [[], []]
    assert index.search(["zoo.fish"], 1)[0][0][0] in (1, 2)


def test_a_corpus_without_words_has_no_results_and_a_warning(caplog):
    index = Bm25([{"id": 1, "title": "...", "text": "!!! ???"}])
    assert index.search(["who", "???"], 3) == [[], []]
    assert "None of 1 passages has a word" in caplog.text


def test_equal_scores_keep_the_order_of_the_passages():
    index = Bm25([{"id": i, "title": "t", "text": "same words"} for i in range(50)])
    assert [row for row, _ in index.search(["words"], 7)[0]] == list(range(7))


def test_rows_are_those_of_the_folder_also_among_some_of_them(folder):
    retriever = Bm25Retriever(Passages.open(folder / "passages"))
    question = ["wheels of the fish"]
    assert [row for row, _ in retriever.search(question, 4)[0]] == [3, 1, 2]
    assert retriever.record(3)["id"] == 14
    (found,) = retriever.among(np.array([1, 3])).search(question, 4)
    assert [row for row, _ in found] == [3, 1]


def test_a_split_without_passages_is_rejected(folder):
    passages = Passages.open(folder / "passages")
    np.testing.assert_array_equal(rows_of_split(passages, "train"), [0, 1])
    with pytest.raises(ValueError, match="No passage of .*'dev'"):
        rows_of_split(passages, "dev")


def test_tuning_prints_every_setting_and_returns_the_best(folder, capsys):
    pattern = str(folder / "questions" / "*-test.jsonl")
    best = bm25.tune(folder / "passages", pattern, 2, (0.2, 0.9), (0.3,), (1, 2))
    assert best in [Bm25Config(k1, 0.3, t) for k1 in (0.2, 0.9) for t in (1, 2)]
    assert capsys.readouterr().out.count("k1=") == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"k1": 0.0}, "k1 must be above 0"),
        ({"b": 1.5}, "b must be from 0 to 1, got 1.5"),
        ({"title_weight": -1}, "title_weight must be at least 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Bm25Config(**settings)


def test_invalid_input_is_rejected(folder, monkeypatch):
    with pytest.raises(ValueError, match="QUESTIONS: no file matches"):
        bm25.tune(folder / "passages", str(folder / "x*"))
    with pytest.raises(ValueError, match="No passage to index"):
        Bm25([])
    with pytest.raises(ValueError, match="k must be at least 1"):
        Bm25(RECORDS).search(["x"], 0)
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    bm25._stemmer.cache_clear()
    with pytest.raises(ValueError, match="needs PyStemmer"):
        Bm25(RECORDS, Bm25Config(stem="english"))
