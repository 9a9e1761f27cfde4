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
        ({"input": " "}, "wanted a question in `input`"),
        ({"input": 3}, "wanted a question in `input`, got 3"),
        ({"input": ""}, "'a' has no question in `input`. KILT's TriviaQA files hold ids alone"),
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
        ({"retrieved": [{"id": "7"}]}, "in `retrieved`, got"),
        ({"retrieved": 1}, "a list in `retrieved`"),
        ({}, "the id 'a' was given before"),
    ],
)
def test_malformed_examples_are_refused_by_line(tmp_path, change, message):
    path = lines(tmp_path, GOOD, {**GOOD, **change})
    with pytest.raises(ValueError, match=f"task-dev.jsonl:2: .*{message}"):
        list(kilt.read_examples(path))


def test_numbers_for_ids_are_read_as_text(tmp_path):
    (found,) = kilt.read_examples(lines(tmp_path, {**GOOD, "id": 7}))
    assert found == {**GOOD, "id": "7"}
    with pytest.raises(ValueError, match="the id '7' was given before"):
        list(kilt.read_examples(lines(tmp_path, {**GOOD, "id": 7}, {**GOOD, "id": "7"})))


MENTION = "a b c [START_ENT] M N [END_ENT] x y z"


@pytest.mark.parametrize(
    ("words", "short"),
    [
        (10, MENTION),
        (8, "b c [START_ENT] M N [END_ENT] x y"),
        (4, "[START_ENT] M N [END_ENT]"),
        (1, "[START_ENT] M N [END_ENT]"),
    ],
)
def test_long_contexts_are_cut_around_their_mention(words, short):
    assert kilt.shortened(MENTION, words) == short


def test_a_mention_at_an_end_gets_the_other_sides_words():
    assert kilt.shortened("[START_ENT] M [END_ENT] v w x y z", 6) == "[START_ENT] M [END_ENT] v w x"
    assert kilt.shortened("v w x y z [START_ENT] M [END_ENT]", 6) == "x y z [START_ENT] M [END_ENT]"
    assert kilt.shortened("a b [START_ENT] M c", 3) == "b [START_ENT] M"


def test_dialogues_keep_their_end_and_questions_stay_whole():
    assert kilt.shortened("one two\nthree four", 2, dialogue=True) == "three four"
    assert kilt.shortened("one two\nthree four", 2) == "one two\nthree four"


def test_bad_lines_are_skipped_when_allowed_up_to_a_limit(tmp_path):
    path = lines(tmp_path, GOOD, {**GOOD, "id": "b"})
    path.write_bytes(b'{"id": NaN}\n' + path.read_bytes() + b'\n{"id": "c"}\n')
    allowed = kilt.Policy("skip", max_skipped=2)
    assert [one["id"] for one in kilt.read_examples(path, allowed)] == ["a", "b"]
    with pytest.raises(ValueError, match="more than 1 bad lines, the last at .*:4"):
        list(kilt.read_examples(path, kilt.Policy("skip", max_skipped=1)))


def test_policies_are_checked():
    with pytest.raises(ValueError, match="on_error must be one of"):
        kilt.Policy("ignore")
    with pytest.raises(ValueError, match="max_skipped must be 0 or more"):
        kilt.Policy(max_skipped=-1)


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


@pytest.mark.parametrize(
    "record, gold",
    [
        ({"page": "p", "chunk": 1}, True),
        ({"page": "p", "chunk": 2}, True),
        ({"page": "p", "chunk": 3}, False),
        ({"page": "q", "chunk": 1}, False),
        ({"title": "p"}, False),
        ({"title": "whole"}, True),
        ({"page": "7", "chunk": 9}, True),
        ({"page": "8", "chunk": 9}, False),
        ({"page": "open", "chunk": 3}, True),
        ({"page": "open", "chunk": 4}, False),
        ({"page": "p", "paragraphs": [2, 5]}, True),
        ({"page": "p", "paragraphs": [0, 1]}, True),
        ({"page": "p", "paragraphs": [0, 5]}, True),
        ({"page": "p", "paragraphs": [3, 5]}, False),
        ({"page": "lost", "paragraphs": [3, 5]}, True),
        ({}, False),
    ],
)
def test_gold_is_the_page_and_the_paragraph(record, gold):
    where = [
        {"wikipedia_id": "p", "start_paragraph_id": 1, "end_paragraph_id": 2},
        {"wikipedia_id": "7", "title": "whole"},
        # KILT's files spell some missing fields as null.
        {"wikipedia_id": "open", "start_paragraph_id": 3, "end_paragraph_id": None},
        {"wikipedia_id": None, "title": "8"},
        # Evidence that KILT did not find in its page.
        {"wikipedia_id": "lost", "start_paragraph_id": -1, "end_paragraph_id": -1},
    ]
    assert kilt.is_gold(record, where) is gold
