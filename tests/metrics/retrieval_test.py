"""Recall of passages by their marks, and of pages by KILT's own definitions."""

import json

import pytest

from glimmer_jax.metrics.kilt import kilt_scores
from glimmer_jax.metrics.retrieval import RetrievalScores

PAGES = [["a", "b", "a", "c"], ["x", "y", "y", "z"]]
GOLD = [
    [{"answer": "1", "provenance": [{"wikipedia_id": "a"}, {"wikipedia_id": "c"}]}],
    [{"answer": "2", "provenance": [{"wikipedia_id": "y"}]}, {"answer": "two"}],
]


def examples():
    for number, (pages, output) in enumerate(zip(PAGES, GOLD, strict=True)):
        right = {one["wikipedia_id"] for one in output[0]["provenance"]}
        retrieved = [{"id": i, "gold": page in right} for i, page in enumerate(pages)]
        yield {"id": str(number), "output": output, "retrieved": retrieved}


def test_scores_of_pages_equal_the_official_ones(tmp_path):
    scores = RetrievalScores((1, 2, 3))
    guesses = []
    for example, pages in zip(examples(), PAGES, strict=True):
        scores.add(example, pages)
        places = [{"wikipedia_id": page} for page in pages]
        guesses.append({"id": example["id"], "output": [{"provenance": places}]})
    for name, rows in (("gold", list(examples())), ("guess", guesses)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    official = kilt_scores(tmp_path / "gold", tmp_path / "guess", [1, 2, 3])["retrieval"]
    expected = {name: official[name] for name in ("Rprec", "recall@2", "recall@3")}
    assert scores.pages() == {"questions": 2, **expected}
    # Half of the first question's pages, and the second question's page at rank 2.
    assert expected == {"Rprec": 0.25, "recall@2": 1.0, "recall@3": 1.0}


def test_passages_count_by_their_marks():
    scores = RetrievalScores((1, 3))
    for example in examples():
        scores.add(example, None)
    assert scores.passages() == {"questions": 2, "recall_at_1": 0.5, "recall_at_3": 1.0}
    assert scores.pages() == {}


def test_provenance_by_title_alone_has_no_scores_of_pages():
    scores = RetrievalScores((1,))
    output = [{"answer": "x", "provenance": [{"title": "Emma"}]}]
    scores.add({"id": "t", "output": output, "retrieved": [{"id": 1, "gold": True}]}, ["15782"])
    assert scores.pages() == {} and scores.passages()["recall_at_1"] == 1.0


def test_questions_without_gold_do_not_count():
    scores = RetrievalScores((1,))
    scores.add({"id": "t", "retrieved": []}, [])
    assert scores.passages() == scores.pages() == {}
    with pytest.raises(ValueError, match="Example 't': expected a string `answer`"):
        scores.add({"id": "t", "output": [{"answer": 3}], "retrieved": []}, [])
