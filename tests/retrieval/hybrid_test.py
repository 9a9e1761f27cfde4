"""Two retrievers as one."""

import json

import numpy as np
import pytest

from glimmer_jax.retrieval import hybrid
from glimmer_jax.retrieval.hybrid import HybridRetriever, fuse, tune
from glimmer_jax.retrieval.retriever import Retriever
from tests.retrieval import tiny_gtr


class Listed(Retriever):
    """Finds what it was told to, whatever the question."""

    questions_at_a_time = 3

    def __init__(self, passages, found):
        super().__init__(passages)
        self.found = found
        self.asked = []

    def search(self, questions, k):
        self.asked.append((len(questions), k))
        return [self.found[:k] for _ in questions]

    def among(self, rows):
        return Listed(self.passages, [one for one in self.found if one[0] in rows])


SPARSE = [(4, 12.0), (2, 9.0), (7, 6.0)]
DENSE = [(7, 0.9), (4, 0.8), (1, 0.5)]


def test_scores_are_brought_to_one_scale_and_weighed():
    # Sparse 1, 1/2, 0 and dense 1, 3/4, 0.
    assert fuse(SPARSE, DENSE, 0.4, 9) == [
        (4, pytest.approx(0.6 + 0.4 * 0.75)),
        (7, pytest.approx(0.4)),
        (2, pytest.approx(0.3)),
        (1, 0.0),
    ]
    assert [row for row, _ in fuse(SPARSE, DENSE, 0.0, 3)] == [4, 2, 1]
    assert [row for row, _ in fuse(SPARSE, DENSE, 1.0, 3)] == [7, 4, 1]


def test_lists_that_are_empty_or_all_equal_are_fused_too():
    assert fuse([], DENSE, 0.5, 1) == [(7, 0.5)]
    assert fuse([], [], 0.5, 1) == []
    assert fuse([(5, 2.0), (3, 2.0)], [], 0.5, 9) == [(3, 0.5), (5, 0.5)]


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    return tiny_gtr.write_corpus(tmp_path_factory.mktemp("corpus") / "passages")


def test_each_retriever_searches_deeper_than_requested(passages):
    sparse, dense = Listed(passages, SPARSE), Listed(passages, DENSE)
    both = HybridRetriever(sparse, dense, 0.4)
    assert [[row for row, _ in found] for found in both.search(["a", "b"], 2)] == [[4, 7]] * 2
    assert sparse.asked == dense.asked == [(2, hybrid.DEPTH)]
    assert [row for row, _ in both.among(np.array([1, 2])).search(["a"], 5)[0]] == [2, 1]
    both.search(["a"], 300)
    assert dense.asked[-1] == (1, 300)


def test_tuning_searches_once_prints_all_weights_returns_the_best(passages, tmp_path, capsys):
    # The answer is row 7: page 3, chunk 1.
    provenance = [{"wikipedia_id": "p3", "start_paragraph_id": 1}]
    example = {"id": "1", "input": "q", "output": [{"answer": "", "provenance": provenance}]}
    (tmp_path / "task-dev.jsonl").write_text(json.dumps(example) + "\n")
    sparse, dense = Listed(passages, SPARSE), Listed(passages, DENSE)
    assert tune(sparse, dense, str(tmp_path / "*-dev.jsonl")) == 0.9
    assert sparse.asked == dense.asked == [(1, 100)]
    shown = capsys.readouterr().out
    assert shown.count("weight=") == 11 and "R@20" in shown


def test_weights_out_of_range_are_rejected(passages):
    with pytest.raises(ValueError, match="DENSE_WEIGHT must be from 0 to 1, got 1.5"):
        HybridRetriever(Listed(passages, SPARSE), Listed(passages, DENSE), 1.5)
