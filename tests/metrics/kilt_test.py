"""Goldens computed with the benchmark's own scripts on small files."""

import json
import pathlib
import subprocess
import sys

import pytest

from glimmer_jax.metrics import kilt, qa
from glimmer_jax.metrics.kilt_predictions import Gold, Guess

# {case: {"gold", "guess": lines, "ks", and both scripts' results}}; no test rewrites it.
PATH = pathlib.Path(__file__).parent / "goldens" / "kilt_scores.json"
CASES = json.loads(PATH.read_text("utf-8"))


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def scores(folder, gold, guess, *ks):
    return kilt.kilt_scores(write(folder / "gold", gold), write(folder / "guess", guess), *ks)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_official_ones(tmp_path, case):
    official = CASES[case]
    result = scores(tmp_path, official["gold"], official["guess"], official["ks"])
    assert result == {"downstream": official["downstream"], "retrieval": official["retrieval"]}


def test_scores_of_many_questions_are_means(tmp_path):
    cases = [case for case in CASES.values() if case["ks"] == [1, 5, 10, 20]]
    gold, guess = [], []
    for number, case in enumerate(cases):
        for lines, key in ((gold, "gold"), (guess, "guess")):
            lines += [{**line, "id": f"{number}/{str(line['id']).strip()}"} for line in case[key]]
    found = scores(tmp_path, gold, guess)
    wanted = sum(case["downstream"]["downstream"]["f1"] * len(case["gold"]) for case in cases)
    assert found["downstream"]["downstream"]["f1"] == pytest.approx(wanted / len(gold))


def test_a_retrieval_run_has_no_downstream_scores(tmp_path):
    case = CASES["a set of pages is found when its last page is"]
    guess = [{"id": "a", "output": [{"provenance": case["guess"][0]["output"][0]["provenance"]}]}]
    found = scores(tmp_path, case["gold"], guess, case["ks"])
    assert found == {"downstream": None, "retrieval": case["retrieval"]}


def test_answers_without_provenance_find_no_page(tmp_path):
    case = CASES["right answer, right page"]
    found = scores(tmp_path, case["gold"], [{"id": "a", "output": [{"answer": "Jane Austen"}]}])
    assert found["downstream"]["downstream"] == case["downstream"]["downstream"]
    assert set(found["downstream"]["kilt"].values()) == set(found["retrieval"].values()) == {0.0}


def test_accuracy_and_f1_differ_from_those_of_scoring():
    gold, guess = Gold("g:1", frozenset(["The"]), (), ()), Guess("p:1", "the", ())
    found = kilt.answer_scores(gold, guess)
    assert (found["accuracy"], found["em"], found["f1"]) == (0.0, 1.0, 0.0)
    assert qa.match_of("The", "the") == qa.f1_of("The", "the") == 1.0


def test_a_ranking_has_a_mark_for_each_set_and_each_wrong_page():
    sets = [frozenset("ab"), frozenset("c"), frozenset("de")]
    assert kilt.ranking(["a", "x", "b"], sets) == [False, True]
    assert kilt.ranking(["d", "c"], sets) == [False, True]
    assert kilt.ranking(["c"], [frozenset("c"), frozenset("cd")]) == [True, False]
    assert kilt.ranking([], sets) == kilt.ranking([], []) == []


@pytest.mark.parametrize("ks", [[], [0, 1], [5, 5], [-1]])
def test_ks_are_distinct_and_positive(tmp_path, ks):
    with pytest.raises(ValueError, match="ks .*distinct positive"):
        kilt.kilt_scores(tmp_path / "gold", tmp_path / "guess", ks)


def test_answers_in_some_lines_only_are_rejected(tmp_path):
    gold = [{"id": name, "output": [{"answer": "x"}]} for name in "ab"]
    guess = [{"id": "a", "output": [{"answer": "x"}]}, {"id": "b", "output": [{"provenance": []}]}]
    with pytest.raises(ValueError, match="guess:2: expected an `answer`.* got none"):
        scores(tmp_path, gold, guess)


def test_gold_lines_without_answers_are_rejected_if_a_guess_has_one(tmp_path):
    gold = [{"id": "a", "output": [{"answer": " "}, {"provenance": [{"wikipedia_id": "1"}]}]}]
    with pytest.raises(ValueError, match="gold:1: expected an answer.* got none"):
        scores(tmp_path, gold, [{"id": "a", "output": [{"answer": "x"}]}])
    assert scores(tmp_path, gold, [{"id": "a", "output": [{"answer": ""}]}])["downstream"]


def test_task_metrics_are_the_official_ones_under_seqios_names():
    metrics = kilt.task_metrics("accuracy", "exact_match", "f1", "rougel")
    targets = [["Jane Austen", " J. Austen "], ["x y"], []]
    found = metrics(targets, ["jane austen.", " x ", "z"])
    third = pytest.approx(1 / 3)
    assert found["accuracy"] == 0.0 and found["exact_match"] == third
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert 0 < found["rougel"] < found["f1"]
    assert metrics([["J. Austen"]], ["J. Austen "])["accuracy"] == 1.0
    assert metrics([], []) == dict.fromkeys(found, 0.0)


def test_the_metrics_load_neither_tensorflow_nor_jax():
    heavy = {"seqio", "tensorflow", "jax"}
    code = f"import sys, glimmer_jax.metrics.kilt; print({heavy} & {{*sys.modules}})"
    root = pathlib.Path(kilt.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
