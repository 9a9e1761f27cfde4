"""Reading exercises: answers are in the gold passage, and an example depends only on its index."""

import dataclasses

import numpy as np
import pytest

from glimmer_jax.data.generated_tasks import blocks
from glimmer_jax.pydocs.reading_exercises import Exercises, Stage
from glimmer_jax.vocabulary import Vocabulary

STAGE = Stage(passages=3, passage_words=(8, 12), clause_words=(4, 6))
RECORDS = [
    {
        "title": f"mod{i % 2}.func_{i}",
        "module": f"mod{i % 2}",
        "text": " ".join(f"word{i}x{j}" for j in range(20)),
    }
    for i in range(10)
]
VOCABULARY = Vocabulary("pydocs")


def text(ids):
    return VOCABULARY.decode([i for i in ids if i])


def exercises(**changes):
    return Exercises(RECORDS, dataclasses.replace(STAGE, **changes), VOCABULARY, seed=1)


def gold(example):
    return text(example["passages"][example["gold_passages"].index(1)])


def test_the_gold_passage_has_the_title_and_the_clause():
    generator = exercises()
    for index in range(20):
        example = generator.example(index)
        assert example["gold_passages"].count(1) == 1
        assert gold(example).startswith(f"title: {text(example['targets'])} context: ")
        clause = text(example["inputs"]).removeprefix("question: ")
        assert clause in gold(example)


def test_restoring_missing_spans_gives_a_clause_of_the_gold_passage():
    generator = exercises(spans=1.0)
    for index in range(20):
        example = generator.example(index)
        clause = text(example["inputs"]).removeprefix("question: ")
        answers = text(example["targets"]).split("<extra_id_")[1:]
        assert answers
        for answer in answers:
            number, _, words = answer.partition("> ")
            clause = clause.replace(f"<extra_id_{number}>", words.strip())
        assert clause in gold(example)


def test_titles_are_real_without_synthetic_titles():
    real = {record["title"] for record in RECORDS}
    assert {text(exercises(synthetic_titles=0.0).example(i)["targets"]) for i in range(9)} <= real
    assert not {text(exercises().example(i)["targets"]) for i in range(9)} & real


def test_siblings_are_from_the_same_module():
    generator = exercises(synthetic_titles=0.0, siblings=1.0)
    for index in range(9):
        titles = [text(ids).split()[1] for ids in generator.example(index)["passages"]]
        assert len({title.split(".")[0] for title in titles}) == 1


def test_an_example_depends_only_on_its_index():
    one, other = exercises(dropped=0.3), exercises(dropped=0.3)
    other.example(0)
    assert one.example(7) == other.example(7)
    assert one.example(7) != one.example(8)


def test_blocks_hold_the_examples_padded():
    generator = exercises()
    (first, second) = blocks(generator, 3, 8, size=4)
    assert [len(block["inputs"]) for block in (first, second)] == [4, 1]
    example = generator.example(4)
    np.testing.assert_array_equal(
        [row[row > 0].tolist() for row in first["passages"][1]][2], example["passages"][2]
    )
    assert first["targets"][1][first["targets"][1] > 0].tolist() == example["targets"]
    assert first["gold_passages"][1].tolist() == example["gold_passages"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(passages=0), "passages must be at least 1"),
        (dict(clause_words=(5, 4)), r"clause_words must be .*got \(5, 4\)"),
        (dict(dropped=1.5), "dropped must be from 0 to 1, got 1.5"),
    ],
)
def test_invalid_stages_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **change)


def test_text_too_short_for_a_clause_is_rejected():
    with pytest.raises(ValueError, match="3 passages .*32 words.* 0 "):
        exercises(clause_words=(30, 30))


def test_the_passages_of_an_example_are_distinct():
    generator = exercises(siblings=1.0, passages=5)
    for index in range(30):
        titles = {
            text(ids).partition(" context: ")[2] for ids in generator.example(index)["passages"]
        }
        assert len(titles) == 5
