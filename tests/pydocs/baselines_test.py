"""Rule-based baselines on a few small passages."""

import pytest

from glimmer_jax.pydocs import baselines
from glimmer_jax.pydocs.questions import TASKS

PASSAGES = [
    {
        "title": "os.join",
        "text": "join(a, *, sep='/') Join the words, one after the other.",
        "gold": 0,
    },
    {"title": "json.dump", "text": "No signature here: the other one.", "gold": 0},
    {"title": "json.dump", "text": "dump(obj, fp, indent=None) Write the one object.", "gold": 1},
]


def test_first_title_is_that_of_the_best_passage():
    assert baselines.first_title("anything", PASSAGES) == "os.join"
    assert baselines.first_title("anything", []) == ""


@pytest.mark.parametrize(
    "question, title",
    [
        ("write object", "json.dump"),
        ("the one", "json.dump"),  # a shorter span than in the first passage
        ("words after other", "os.join"),
        ("other words", "os.join"),  # no passage has this order: the first passage
    ],
)
def test_words_match_in_order_and_close_together(question, title):
    assert baselines.word_match(question, PASSAGES) == title


@pytest.mark.parametrize(
    "question, order",
    [
        ("write object", [2, 0, 1]),  # a clause: the shortest span of its words
        ("nowhere to be found", [0, 1, 2]),  # the retriever's order
        ("json.dump [SEP] default of indent", [1, 2, 0]),  # the named page
        ("The default of indent in json.dump is None.", [1, 2, 0]),
        ("json.dump: Write the object.", [2, 1, 0]),  # the named page, then the words
    ],
)
def test_rule_order_prefers_the_named_page_and_the_shortest_span(question, order):
    assert baselines.rule_order(question, PASSAGES) == order


def test_random_parameters_are_of_the_signature_seeded_by_question():
    questions = [f"question {i}" for i in range(40)]
    first = [baselines.random_parameter(question, PASSAGES) for question in questions]
    gold = [baselines.random_of_gold(question, PASSAGES) for question in questions]
    assert set(first) == {"a", "sep"} and set(gold) == {"obj", "fp", "indent"}
    assert first == [baselines.random_parameter(question, PASSAGES) for question in questions]
    assert baselines.random_of_gold("question", PASSAGES[:2]) == ""
    assert baselines.random_parameter("question", PASSAGES[1:2]) == ""


@pytest.mark.parametrize(
    "question, answer",
    [
        ("json.dump [SEP] default of indent", "None"),
        ("json.dump [SEP] first parameter", "obj"),
        ("json.dump [SEP] parameter after obj", "fp"),
        ("os.join [SEP] parameter after a", "sep"),
        ("os.split [SEP] first parameter", ""),
    ],
)
def test_the_slot_rule_reads_the_signature_of_the_named_page(question, answer):
    assert baselines.slot_rule(question, PASSAGES) == answer


@pytest.mark.parametrize(
    "claim, truth",
    [
        ("The default of indent in json.dump is None.", True),
        ("The default of indent in json.dump is 2.", False),
        ("The first parameter in json.dump is a.", False),
        ("The first parameter in os.split is a.", False),
        ("json.dump: Write one object.", True),
        ("os.join: Write one object.", False),
    ],
)
def test_the_claim_rule_reads_the_signature_or_the_docstring(claim, truth):
    answer = "SUPPORTS" if truth else "REFUTES"
    assert baselines.claim_rule(claim, PASSAGES) == answer
    assert baselines.always_supports(claim, PASSAGES) == "SUPPORTS"


def test_scores_has_one_value_per_question_and_the_retrievers_recall():
    assert tuple(baselines.BASELINES) == TASKS
    records = dict(enumerate(PASSAGES))
    lines = [
        {
            "id": f"q{number}",
            "input": "write object",
            "output": [{"answer": answer}],
            "retrieved": [{"id": i, "gold": i == 2} for i in range(3)],
        }
        for number, answer in enumerate(("json.dump", "os.join"))
    ]
    assert baselines.scores("which_function", lines, records) == {
        "first_title": [0.0, 1.0],
        "word_match": [1.0, 0.0],
        "recall_at_1": [0.0, 0.0],
        "recall_at_10": [1.0, 1.0],
    }
    with pytest.raises(ValueError, match="'q0' has passage 2, .* the 2 records"):
        baselines.scores("which_function", lines, {0: PASSAGES[0], 1: PASSAGES[1]})
