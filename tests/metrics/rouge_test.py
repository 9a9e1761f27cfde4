import json
import pathlib

import pytest

from glimmer_jax.metrics.kilt import common_words, rouge_l

# [prediction, target, score], with scores computed by rouge 1.0.1; no test rewrites them.
PAIRS = json.loads((pathlib.Path(__file__).parent / "goldens" / "rouge_l.json").read_text("utf-8"))


@pytest.mark.parametrize(("prediction", "target", "score"), PAIRS)
def test_scores_are_those_of_the_rouge_package(prediction, target, score):
    assert rouge_l(prediction, target) == score


def test_ties_are_broken_by_the_subsequence_that_ends_first():
    assert common_words(["a", "b"], ["b", "a"]) == {"b"}
    assert common_words(["b", "a"], ["a", "b"]) == {"a"}


def test_long_sentences_need_no_recursion():
    words = [str(number) for number in range(1500)]
    assert rouge_l(" ".join(words), " ".join(words)) == pytest.approx(1.0)
