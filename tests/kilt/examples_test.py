import json

import pytest

from glimmer_jax.kilt import examples as kilt

GOOD = {"id": "a", "input": "who", "output": [{"answer": "x", "provenance": []}], "meta": {}}


def lines(tmp_path, *examples):
    path = tmp_path / "task-dev.jsonl"
    path.write_text("\n".join(json.dumps(example) for example in examples))
    return path


def test_examples_are_read_in_order(tmp_path):
    path = lines(tmp_path, GOOD, {"id": "b", "input": "test file without output"})
    assert [example["id"] for example in kilt.read_examples(path)] == ["a", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": 3.5}, "string `id`, got 3.5"),
        ({"id": True}, "string `id`, got True"),
        ({"input": " "}, "expected a question in `input`"),
        ({"input": 3}, "expected a question in `input`, got 3"),
        ({"input": ""}, "'a' has no question in `input`. KILT's TriviaQA files hold only ids"),
        ({"output": {}}, "list of objects in `output`"),
        ({"output": [{"answer": 3}]}, "string `answer`, got 3"),
        ({"output": [{"provenance": [1]}]}, "list of objects in `provenance`"),
        (
            {"output": [{"provenance": [{"start_paragraph_id": "3"}]}]},
            "number or null in `start_paragraph_id`, got '3'",
        ),
        (
            {"output": [{"provenance": [{"bleu_score": "0.9"}]}]},
            "number or null in `bleu_score`, got '0.9'",
        ),
        ({"output": [{"provenance": [{"wikipedia_id": 1.0}]}]}, "`wikipedia_id`, got 1.0"),
        ({"output": [{"provenance": [{"wikipedia_id": ["2"]}]}]}, "`wikipedia_id`, got"),
        ({"output": [{"provenance": [{"title": True}]}]}, "`title`, got True"),
        ({"retrieved": [{"id": 1, "gold": "false"}]}, "true or false in `gold`, got 'false'"),
        ({"retrieved": [{"id": 7.5}]}, "in `retrieved`, got"),
        ({"retrieved": [{}]}, "in `retrieved`, got"),
        ({"input": None, "question": "who"}, "`question` but no `input`. Rename"),
        ({"input": None, "query": "who"}, "`query` but no `input`. Rename"),
        ({"retrieved": 1}, "a list in `retrieved`"),
        ({}, "the id 'a' occurs more than once"),
    ],
)
def test_invalid_examples_are_rejected_by_line(tmp_path, change, message):
    path = lines(tmp_path, GOOD, {**GOOD, **change})
    with pytest.raises(ValueError, match=f"task-dev.jsonl:2: .*{message}"):
        list(kilt.read_examples(path))


def test_names_of_provenance_may_be_null(tmp_path):
    place = {"wikipedia_id": "7", "title": None}
    path = lines(tmp_path, {**GOOD, "output": [{"answer": "x", "provenance": [place]}]})
    assert kilt.provenance(next(kilt.read_examples(path))) == [{"wikipedia_id": "7"}]


def test_null_equals_absent(tmp_path):
    place = {"wikipedia_id": None, "title": "T", "start_paragraph_id": None}
    outputs = [{"answer": None, "provenance": [place]}, {"answer": "x", "provenance": None}]
    given = {"id": "a", "input": "who", "output": outputs, "meta": None, "retrieved": None}
    read = {
        "id": "a",
        "input": "who",
        "output": [{"provenance": [{"title": "T"}]}, {"answer": "x"}],
    }
    assert list(kilt.read_examples(lines(tmp_path, given))) == [read]
    (found,) = kilt.read_examples(lines(tmp_path, {**GOOD, "output": None}))
    assert "output" not in found and kilt.answers(found) == []


def test_numbers_for_ids_are_read_as_text(tmp_path):
    (found,) = kilt.read_examples(lines(tmp_path, {**GOOD, "id": 7}))
    assert found == {**GOOD, "id": "7"}
    with pytest.raises(ValueError, match="'7' .*more than once"):
        list(kilt.read_examples(lines(tmp_path, {**GOOD, "id": 7}, {**GOOD, "id": "7"})))


def test_answers_are_distinct_and_provenance_is_pooled():
    example = {
        "output": [
            {"answer": "x", "provenance": [{"wikipedia_id": "1"}]},
            {"answer": "x"},
            {"provenance": [{"wikipedia_id": "2"}]},
            {"answer": "y"},
        ]
    }
    assert kilt.answers(example) == ["x", "y"]
    assert [one["wikipedia_id"] for one in kilt.provenance(example)] == ["1", "2"]
    assert kilt.answers({}) == [] == kilt.provenance({})
