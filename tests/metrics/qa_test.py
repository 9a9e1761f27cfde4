import json

import numpy as np
import pytest

from glimmer_jax.metrics import qa


@pytest.mark.parametrize(
    "text, normal",
    [("The  Beatles!", "beatles"), ("json.dumps", "jsondumps"), ("An a the", ""), ("'x'", "x")],
)
def test_answers_are_normalised_as_in_squad(text, normal):
    assert qa.normalize_answer(text) == normal


def test_the_best_of_several_answers_counts():
    targets = [["Paris", "City of Paris"], "None", ["x"]]
    predictions = ["the city of paris", "none.", "y"]
    assert qa.exact_match(targets, predictions) == {"exact_match": pytest.approx(2 / 3)}
    assert qa.accuracy(targets, predictions) == {"accuracy": pytest.approx(2 / 3)}


def test_questions_without_answers_do_not_count():
    assert qa.exact_match([["x"], [], ["y"]], ["x", "x", "x"]) == {"exact_match": 0.5}
    assert qa.exact_match([[]], ["x"]) == {"exact_match": 0.0}


def test_f1_is_over_words_with_their_counts():
    assert qa.f1_of("a b b c", "b b d") == pytest.approx(2 * 2 / (3 + 3))
    assert qa.f1_of(["x", "x y"], "x y") == 1.0
    assert qa.f1_of("the", "an") == 1.0 and qa.f1_of("the", "x") == 0.0
    assert qa.f1(["x"], ["x"]) == {"f1": 1.0} and qa.f1([], []) == {"f1": 0.0}


@pytest.mark.parametrize(
    "gold, at_1, at_2", [((0, 1), 0, 1), ((1, 0), 1, 1), ((), 0, 0), ((0, 0), 0, 0)]
)
def test_recall_counts_the_first_passages(gold, at_1, at_2):
    assert (qa.recall_of(gold, 1), qa.recall_of(gold, 2)) == (at_1, at_2)


def test_numbers_of_targets_and_predictions_must_agree():
    with pytest.raises(ValueError, match="1 predictions and 2 targets"):
        qa.exact_match(["a", "b"], ["a"])


def test_the_interval_of_a_mean_matches_the_normal_approximation():
    scores = np.random.default_rng(1).random(2000) < 0.3
    found = qa.bootstrap(scores)
    half = 1.96 * scores.std() / np.sqrt(2000)
    assert found["n"] == 2000 and found["mean"] == scores.mean()
    assert found["low"] == pytest.approx(found["mean"] - half, abs=0.003)
    assert found["high"] == pytest.approx(found["mean"] + half, abs=0.003)
    assert qa.bootstrap(scores) == found != qa.bootstrap(scores, seed=1)


def test_groups_that_succeed_together_widen_the_interval():
    pages = np.random.default_rng(1).random(200) < 0.5
    scores, groups = np.repeat(pages, 4), np.repeat(np.arange(200), 4)
    alone, together = qa.bootstrap(scores), qa.bootstrap(scores, groups=list(groups))
    assert together["mean"] == alone["mean"]
    widths = [found["high"] - found["low"] for found in (alone, together)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.15)


def test_pairing_narrows_the_interval():
    easy = np.random.default_rng(1).random(1000)
    a, b = easy < 0.6, easy < 0.55
    found = qa.paired_bootstrap(a, b, seed=3)
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert 0 < found["low"] < found["difference"] < found["high"] < 0.08
    same = qa.paired_bootstrap(a, a)
    assert same["low"] == same["high"] == 0.0


def test_invalid_scores_are_rejected():
    with pytest.raises(ValueError, match=r"scores.*n >= 1, got \(0,\)"):
        qa.bootstrap([])
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        qa.bootstrap([1.0], level=95)
    with pytest.raises(ValueError, match="groups.*2, got 1"):
        qa.bootstrap([1.0, 0.0], groups=["p"])
    with pytest.raises(ValueError, match=r"\(1,\) and \(2,\)"):
        qa.paired_bootstrap([1.0], [1.0, 0.0])


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def question(name, answer, gold):
    provenance = [{"wikipedia_id": name}]
    retrieved = [{"id": 1, "gold": gold == 1}, {"id": 2, "gold": gold == 2}]
    output = [{"answer": answer, "provenance": provenance}]
    return {"id": name, "input": "?", "output": output, "retrieved": retrieved}


def test_a_prediction_file_is_scored_by_id(tmp_path):
    questions = write(tmp_path / "q", question("a", "x", 1), question("b", "y", 2))
    predictions = write(
        tmp_path / "p",
        {"id": "b", "output": [{"answer": "z"}], "passage_ids": [1, 2]},
        {"id": "a", "prediction": "X", "passage_ids": [1]},
    )
    found = qa.score_file(predictions, questions)
    assert {name: row["mean"] for name, row in found.items()} == {
        "exact_match": 0.5,
        "f1": 0.5,
        "recall_at_1": 0.5,
        "recall_at_5": 1.0,
    }
    assert found["f1"]["n"] == 2


def test_numbered_predictions_count_and_unmarked_passages_have_no_recall(tmp_path):
    unmarked = {**question("7", "x", 1), "retrieved": [{"id": 1}]}
    questions = write(tmp_path / "q", unmarked)
    predictions = write(tmp_path / "p", {"id": 7, "prediction": "x", "passage_ids": [1]})
    found = qa.score_file(predictions, questions)
    assert found["exact_match"]["mean"] == 1.0 and found.keys() == {"exact_match", "f1"}


def test_incomplete_and_malformed_predictions_are_rejected(tmp_path):
    questions = write(tmp_path / "q", question("a", "x", 1), question("b", "y", 2))
    with pytest.raises(ValueError, match="PREDICTIONS: 1 questions .*'b'"):
        qa.score_file(write(tmp_path / "p", {"id": "a", "prediction": ""}), questions)
    with pytest.raises(ValueError, match="p:2: .*`id`, got 'a'"):
        qa.score_file(write(tmp_path / "p", *[{"id": "a", "prediction": ""}] * 2), questions)
    with pytest.raises(ValueError, match="PREDICTIONS: 'a' has no answer"):
        qa.score_file(write(tmp_path / "p", {"id": "a"}, {"id": "b"}), questions)
    for output in ("x", {"answer": "x"}, [7], [], 7):
        predictions = write(tmp_path / "p", *({"id": name, "output": output} for name in "ab"))
        with pytest.raises(ValueError, match="PREDICTIONS: 'a' has no answer"):
            qa.score_file(predictions, questions)
    for field, value in (("passage_ids", 7), ("passage_ids", [None]), ("passages", [{"x": 1}, 2])):
        lines = ({"id": name, "prediction": "x", field: value} for name in "ab")
        predictions = write(tmp_path / "p", *lines)
        with pytest.raises(ValueError, match="PREDICTIONS: 'a': .*`id`"):
            qa.score_file(predictions, questions)
    blind = write(tmp_path / "blind", {"id": "a", "input": "?"})
    with pytest.raises(ValueError, match="QUESTIONS: .*blind .*no answers"):
        qa.score_file(write(tmp_path / "p", {"id": "a", "prediction": ""}), blind)


def test_answers_are_compared_in_one_unicode_form():
    assert qa.match_of("Beyonce\u0301", "Beyonc\u00e9") == 1.0
    assert qa.f1_of(["the ﬁnal ＡＢ"], "final AB") == 1.0
