"""Answers by simple rules, without a model: the figures that every result stands beside.

    which_function      first_title      title of the retriever's first passage
                        word_match       title of the passage with the question's words in order, and
                                         the fewest words from the first to the last of them
    slot_filling        random_parameter a random parameter of the first signature
                        random_of_gold   a random parameter of the gold passage's signature
                        signature_rule   what the signature of the page in question says
    fact_verification   always_supports  one answer for every claim; half of them are true
                        signature_rule   compares the claim with that signature, or with the docstring

A rule reads the same retrieved passages as the models. The two rules and `word_match` know the form of
the questions, so they are upper bounds for reading rather than systems to compare with.
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
    """The retriever as a reader."""
    del question
    return passages[0]["title"] if passages else ""


def word_match(question: str, passages: Passages) -> str:
    """Title of the passage that holds the question's words in order, closest together."""
    spans = [(_span(one["text"], question), rank) for rank, one in enumerate(passages)]
    return passages[min(spans)[1]]["title"] if passages else ""


def random_parameter(question: str, passages: Passages) -> str:
    """A parameter of the first signature, drawn by the question's text."""
    shown = next((found for found in map(_parameters, passages) if found), [])
    return _drawn(question, shown)


def random_of_gold(question: str, passages: Passages) -> str:
    """A parameter of the gold passage's signature, drawn by the question's text; "" without one."""
    gold = next((one for one in passages if one["gold"]), None)
    return "" if gold is None else _drawn(question, _parameters(gold))


def slot_rule(question: str, passages: Passages) -> str:
    """What the signature of the page in question says; "" where no passage shows it."""
    name, _, relation = question.partition(" [SEP] ")
    return value_of(relation, _parameters_of(name, passages)) or ""


def always_supports(question: str, passages: Passages) -> str:
    """SUPPORTS."""
    del question, passages
    return SUPPORTS


def claim_rule(question: str, passages: Passages) -> str:
    """Whether the passages of the page in question say the claim."""
    claim = parse_claim(question)
    if claim is not None:
        relation, name, value = claim
        return SUPPORTS if value_of(relation, _parameters_of(name, passages)) == value else REFUTES
    name, _, words = question.partition(": ")
    told = any(_span(one["text"], words) < ABSENT for one in passages if one["title"] == name)
    return SUPPORTS if told else REFUTES


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
    """Scores of every rule, and of the retriever, on each question in order.

    Args:
      task: one of `BASELINES`.
      lines: retrieved examples, with gold marks.
      records: passage id -> `{"title", "text"}`.

    Returns:
      Exact match (0 or 1) by rule; `recall_at_1` and `recall_at_10` of the retriever.

    Raises:
      ValueError: a passage of a question is not in `records`.
    """
    found: dict[str, list[float]] = {name: [] for name in BASELINES[task]}
    for line in lines:
        passages = [_passage(one, records, line["id"]) for one in line["retrieved"]]
        for name, rule in BASELINES[task].items():
            answer = rule(line["input"], passages)
            found[name].append(qa.match_of(answers(line), answer))
        for at in (1, 10):
            marks = [one["gold"] for one in passages]
            found.setdefault(f"recall_at_{at}", []).append(qa.recall_of(marks, at))
    return found


def _passage(
    one: Mapping[str, Any], records: Mapping[int, Mapping[str, Any]], question: str
) -> Mapping[str, Any]:
    if one["id"] not in records:
        raise ValueError(
            f"Question {question!r} has passage {one['id']}, which is none of the {len(records)} "
            "records. Give the passages that the questions were retrieved from."
        )
    record = records[one["id"]]
    return {"title": record["title"], "text": record["text"], "gold": bool(one["gold"])}


def _parameters(passage: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    return shown_parameters(signature_in(passage["text"]))


def _parameters_of(name: str, passages: Passages) -> list[tuple[str, str | None]]:
    """Those of the first signature among a page's passages."""
    shown = (_parameters(one) for one in passages if one["title"] == name)
    return next((found for found in shown if found), [])


def _drawn(question: str, shown: Sequence[tuple[str, str | None]]) -> str:
    return random.Random(question).choice([name for name, _ in shown]) if shown else ""


def _span(text: str, clause: str) -> int:
    """Words from the first to the last of a clause's words in a text, in order, in any capitals."""
    words, wanted = clean_words(text.lower()), clean_words(clause.lower())
    least = ABSENT
    for start in (place for place, word in enumerate(words) if wanted and word == wanted[0]):
        rest = enumerate(words[start:], start=1)
        ends = [next((end for end, word in rest if word == one), ABSENT) for one in wanted]
        least = min(least, ends[-1])
    return least
