import json

import pytest

from glimmer_jax.metrics import kilt_predictions

GOLD = {"id": "a", "output": [{"answer": "x", "provenance": [{"wikipedia_id": "1"}]}]}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_pairs_come_in_the_order_of_the_gold_file(tmp_path):
    gold = write(tmp_path / "gold", {**GOLD, "id": 7}, {**GOLD, "id": " b "})
    guess = write(tmp_path / "guess", *({**GOLD, "id": name} for name in ("c", "b", "7")))
    pairs = kilt_predictions.read_pairs(gold, guess)
    assert [pair[0].where for pair in pairs] == [f"{gold}:1", f"{gold}:2"]
    assert [pair[1].where for pair in pairs] == [f"{guess}:3", f"{guess}:2"]


def test_answers_and_pages_of_a_gold_line_are_distinct():
    pages = [{"wikipedia_id": 1}, {"wikipedia_id": " 1 "}, {"wikipedia_id": "2"}, {"title": "T"}]
    outputs = [
        {"answer": " x "},
        {"answer": "x", "provenance": pages},
        {"answer": None, "provenance": pages[::-1]},
        {"provenance": []},
    ]
    found = kilt_predictions.parse_gold({"id": "a", "output": outputs}, "gold:1")
    assert found.answers == {"x"}
    assert found.pages == (("1", "2"), ("2", "1"), ())
    assert found.evidence == (frozenset(["1", "2", ""]), frozenset())


def test_a_guess_keeps_the_order_of_its_pages():
    pages = [{"wikipedia_id": page} for page in ("9", 3, "9", "1")]
    line = {"id": "a", "output": [{"answer": " x ", "provenance": pages}]}
    found = kilt_predictions.parse_guess(line, "guess:1")
    assert (found.answer, found.pages) == ("x", ("9", "3", "1"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"output": []}, "expected a string or an integer `id`, got None"),
        ({**GOLD, "id": True}, "expected a string or an integer `id`, got True"),
        ({"id": "b"}, "expected a list of objects in `output`, got None"),
        ({"id": "b", "output": {}}, "expected a list of objects in `output`, got {}"),
        ({"id": "b", "output": ["x"]}, r"expected a list of objects in `output`, got \['x'\]"),
        ({"id": "b", "output": [{"answer": "x", "provenance": None}]}, "in `provenance`, got None"),
        ({**GOLD, "id": " a"}, "the id 'a' is already in .*:1"),
    ],
)
@pytest.mark.parametrize("broken", ["gold", "guess"])
def test_malformed_lines_are_reported_with_file_and_line(tmp_path, broken, line, message):
    lines = {"gold": [GOLD, {**GOLD, "id": "b"}], "guess": [GOLD, {**GOLD, "id": "b"}]}
    lines[broken][1] = line
    paths = [write(tmp_path / name, *lines[name]) for name in ("gold", "guess")]
    with pytest.raises(ValueError, match=f"{broken}:2: .*{message}"):
        kilt_predictions.read_pairs(*paths)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], r"guess:1: expected one object in `output`, got 0"),
        ([{"answer": "x"}, {"answer": "y"}], r"guess:1: expected one object in `output`, got 2"),
        ([{"text": "x"}], r"guess:1: expected `answer`, `provenance` or both .*, got \['text'\]"),
    ],
)
def test_a_guess_is_one_answer_with_its_pages(outputs, message):
    with pytest.raises(ValueError, match=message):
        kilt_predictions.parse_guess({"id": "a", "output": outputs}, "guess:1")


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "gold:1: expected one or more objects in `output`, got \\[\\].*labelled"),
        ([{"answer": 42}], "gold:1: expected a string `answer`, got 42"),
    ],
)
def test_gold_lines_are_labelled_with_text(outputs, message):
    with pytest.raises(ValueError, match=message):
        kilt_predictions.parse_gold({"id": "a", "output": outputs}, "gold:1")


def test_gold_questions_without_a_guess_are_rejected(tmp_path):
    gold = write(tmp_path / "gold", GOLD, {**GOLD, "id": "b"}, {**GOLD, "id": "c"})
    message = "no guess for 2 of 3 questions of .*gold, the first is 'b'"
    with pytest.raises(ValueError, match=message):
        kilt_predictions.read_pairs(gold, write(tmp_path / "guess", GOLD))
    with pytest.raises(ValueError, match="empty .*no questions"):
        kilt_predictions.read_pairs(write(tmp_path / "empty"), gold)
