"""Renaming on the built-in corpus preserves what decides an answer and the truth of claims."""

import random
from collections import Counter

import pytest

from glimmer_jax.pydocs import clauses, corpus, signatures
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.pydocs.renamed_questions import RenamedQuestions
from glimmer_jax.vocabulary import Vocabulary

VOCABULARY = Vocabulary("pydocs")
PASSAGES = 5
COUNTS = [pytest.param(400, id="400"), pytest.param(5000, id="5000", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def renamed(pydocs_examples):
    """task -> renamed questions whose retrieved passages are the gold one and random training ones."""
    records = {record["id"]: record for record in corpus.train_texts()}
    others = sorted(records)
    draw = random.Random(0)
    by_task = {}
    for task in TASKS:
        lines = []
        for example in pydocs_examples[task, "train"]:
            (provenance,) = example["output"][0]["provenance"]
            gold = corpus.passage_id(provenance["title"], provenance["start_paragraph_id"])
            ids = [i for i in draw.sample(others, PASSAGES) if i != gold][: PASSAGES - 1]
            ids.insert(draw.randrange(3), gold)
            retrieved = [{"id": i, "gold": i == gold} for i in ids]
            lines.append({**example, "retrieved": retrieved})
        by_task[task] = RenamedQuestions({task: lines}, records, PASSAGES, VOCABULARY)
    return by_task


def read(example):
    """(question, answer, title of the gold passage, its text)."""
    gold = VOCABULARY.decode(example["passages"][example["gold_passages"].index(1)])
    title, _, text = gold.removeprefix("title: ").partition(" context: ")
    question = VOCABULARY.decode(example["inputs"]).removeprefix("question: ")
    return question, VOCABULARY.decode(example["targets"]), title, text


def parameters(text):
    """The signature's parameters."""
    return signatures.shown_parameters(signatures.signature_in(text))


@pytest.mark.parametrize("count", COUNTS)
def test_which_function_clauses_stay_in_their_passage_in_order(renamed, count):
    for index in range(count):
        question, answer, title, text = read(renamed["which_function"].example(index))
        assert answer == title
        rest = iter(clauses.clean_words(text))
        assert all(word in rest for word in question.split()), (question, text)


@pytest.mark.parametrize("count", COUNTS)
def test_slots_keep_their_parameter_and_their_answer(renamed, count):
    for index in range(count):
        question, answer, title, text = read(renamed["slot_filling"].example(index))
        name, relation = question.split(" [SEP] ")
        assert name == title
        assert signatures.value_of(relation, parameters(text)) == answer, (question, text)


@pytest.mark.parametrize("count", COUNTS)
def test_true_claims_stay_true_and_false_ones_false(renamed, count):
    seen = Counter()
    for index in range(count):
        question, answer, title, text = read(renamed["fact_verification"].example(index))
        claim = signatures.parse_claim(question)
        if claim is not None:
            relation, name, value = claim
            assert name == title
            truth = signatures.value_of(relation, parameters(text)) == value
        else:
            words = clauses.clean_words(question.removeprefix(f"{title}:"))
            truth = set(words) <= set(clauses.clean_words(text))
        assert truth == (answer == "SUPPORTS"), (question, answer, text)
        seen[claim is None, answer] += 1
    assert len(seen) == 4 and min(seen.values()) > count / 20


def test_names_parameters_and_defaults_do_not_repeat(renamed):
    for task in ("slot_filling", "fact_verification"):
        questions = [read(renamed[task].example(index))[0] for index in range(300)]
        assert len(set(questions)) > 0.99 * len(questions)


def test_synthetic_parameters_reveal_neither_gold_passage_nor_truth(renamed, pydocs_examples):
    real = {name for page in corpus.pages() for name, _ in page.documented.parameters}
    gold, others, values = Counter(), Counter(), {"SUPPORTS": Counter(), "REFUTES": Counter()}
    for index in range(400):
        example = renamed["fact_verification"].example(index)
        for ids, is_gold in zip(example["passages"], example["gold_passages"], strict=True):
            text = VOCABULARY.decode(ids).partition(" context: ")[2]
            (gold if is_gold else others).update(name in real for name, _ in parameters(text))
        question, answer, _, _ = read(example)
        claim = signatures.parse_claim(question)
        if claim is not None and not claim[0].startswith("default"):
            values[answer][claim[2] in real] += 1
    shares = [count[True] / count.total() for count in (gold, others, *values.values())]
    assert max(shares) - min(shares) < 0.12 and max(shares) < 0.5, shares
