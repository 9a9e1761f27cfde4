"""Rule-based baselines without a model, to compare results with.

    which_function      first_title      title of the retriever's first passage
                        word_match       title of the passage with the shortest span that holds the
                                         question's words in order
    slot_filling        random_parameter a random parameter of the first signature
                        random_of_gold   a random parameter of the gold passage's signature
                        signature_rule   the value in the signature of the named page
    fact_verification   always_supports  one answer for every claim; half of them are true
                        signature_rule   compares the claim with that signature, or with the
                        docstring

Rules read the same retrieved passages as the models. `signature_rule` and `word_match` know the
form of the questions, so they are upper bounds for reading rather than baselines.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glimmer_jax.kilt.examples import answers
from glimmer_jax.metrics import qa
from glimmer_jax.pydocs.clauses import clean_words
from glimmer_jax.pydocs.signatures import parse_claim, shown_parameters, signature_in, value_of

# A passage of a question, best first: {"title", "text", "gold"}.
Passages = Sequence[Mapping[str, Any]]
SUPPORTS, REFUTES = "SUPPORTS", "REFUTES"
ABSENT = 10**9  # more words than any text has


def first_title(question: str, passages: Passages) -> str:
    """The title of the best retrieved passage; "" without passages."""
    del question
    return passages[0]["title"] if passages else ""


def word_match(question: str, passages: Passages) -> str:
    """The title of the passage with the shortest span of the question's words; "" without passages."""
    spans = [(_span(passage["text"], question), rank) for rank, passage in enumerate(passages)]
    return passages[min(spans)[1]]["title"] if passages else ""


def rule_order(question: str, passages: Passages) -> list[int]:
    """Indices of the passages, best first: an order by string matching, for all three tasks.

    Passages of a page that the question names come first, then those with the shortest span of the
    question's words; ties are in the retriever's order.
    """
    claim = parse_claim(question)
    name, _, words = question.partition(": ")
    if claim is not None or not words:
        name, words = question.partition(" [SEP] ")[0] if claim is None else claim[1], question
    named = [passage["title"] == name for passage in passages]
    spans = [_span(passage["text"], words) for passage in passages]
    return sorted(range(len(passages)), key=lambda rank: (not named[rank], spans[rank], rank))


def random_parameter(question: str, passages: Passages) -> str:
    """A random parameter of the first signature, seeded by the question; "" without a signature."""
    shown = next((parameters for parameters in map(_parameters, passages) if parameters), [])
    return _draw(question, shown)


def random_of_gold(question: str, passages: Passages) -> str:
    """A random parameter of the gold passage's signature, seeded by the question; "" without one."""
    gold = next((passage for passage in passages if passage["gold"]), None)
    return "" if gold is None else _draw(question, _parameters(gold))


def slot_rule(question: str, passages: Passages) -> str:
    """The answer from the signature of the named page; "" if no passage shows it."""
    name, _, relation = question.partition(" [SEP] ")
    return value_of(relation, _parameters_of(name, passages)) or ""


def always_supports(question: str, passages: Passages) -> str:
    """Returns SUPPORTS for every claim."""
    del question, passages
    return SUPPORTS


def claim_rule(question: str, passages: Passages) -> str:
    """SUPPORTS if a retrieved passage of the named page contains the claim, else REFUTES."""
    claim = parse_claim(question)
    if claim is not None:
        relation, name, value = claim
        return SUPPORTS if value_of(relation, _parameters_of(name, passages)) == value else REFUTES
    name, _, words = question.partition(": ")
    texts = (passage["text"] for passage in passages if passage["title"] == name)
    return SUPPORTS if any(_span(text, words) < ABSENT for text in texts) else REFUTES


BASELINES: Mapping[str, Mapping[str, Callable[[str, Passages], str]]] = {
    "which_function": {"first_title": first_title, "word_match": word_match},
    "slot_filling": {
        "random_parameter": random_parameter,
        "random_of_gold": random_of_gold,
        "signature_rule": slot_rule,
    },
    "fact_verification": {"always_supports": always_supports, "signature_rule": claim_rule},
}


def scores(
    task: str, lines: Sequence[Mapping[str, Any]], records: Mapping[int, Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Scores of every rule and of the retriever on each question, in order.

    Args:
      task: one of `BASELINES`.
      lines: retrieved examples, with gold marks.
      records: passage id -> `{"title", "text"}`.

    Returns:
      `{name: one score per question}`: exact match (0 or 1) of each rule, and `recall_at_1` and
      `recall_at_10` (0 or 1) of the retriever.

    Raises:
      ValueError: a passage of a question is not in `records`.
    """
    by_name: dict[str, list[float]] = {name: [] for name in BASELINES[task]}
    for line in lines:
        passages = [_passage(retrieved, records, line["id"]) for retrieved in line["retrieved"]]
        for name, rule in BASELINES[task].items():
            answer = rule(line["input"], passages)
            by_name[name].append(qa.match_of(answers(line), answer))
        for at in (1, 10):
            marks = [passage["gold"] for passage in passages]
            by_name.setdefault(f"recall_at_{at}", []).append(qa.recall_of(marks, at))
    return by_name


def _passage(
    retrieved: Mapping[str, Any], records: Mapping[int, Mapping[str, Any]], question: str
) -> Mapping[str, Any]:
    if retrieved["id"] not in records:
        raise ValueError(
            f"Question {question!r} has passage {retrieved['id']}, which is not among the "
            f"{len(records)} records. Pass the records that the questions were retrieved from."
        )
    record = records[retrieved["id"]]
    return {"title": record["title"], "text": record["text"], "gold": bool(retrieved["gold"])}


def _parameters(passage: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    return shown_parameters(signature_in(passage["text"]))


def _parameters_of(name: str, passages: Passages) -> list[tuple[str, str | None]]:
    """Parameters of the first signature among a page's passages."""
    shown = (_parameters(passage) for passage in passages if passage["title"] == name)
    return next((parameters for parameters in shown if parameters), [])


def _draw(question: str, shown: Sequence[tuple[str, str | None]]) -> str:
    return random.Random(question).choice([name for name, _ in shown]) if shown else ""


def _span(text: str, clause: str) -> int:
    """Length in words of the shortest span of a text that holds a clause's words in order.

    Case is ignored; `ABSENT` if there is no such span.
    """
    words, clause_words = clean_words(text.lower()), clean_words(clause.lower())
    shortest = ABSENT
    for start in (i for i, word in enumerate(words) if clause_words and word == clause_words[0]):
        rest = enumerate(words[start:], start=1)
        ends = [next((end for end, x in rest if x == word), ABSENT) for word in clause_words]
        shortest = min(shortest, ends[-1])
    return shortest
