"""Metrics of answers: exact match, F1, recall of passages, and bootstrap intervals.

Answers are normalised as in SQuAD: lower case, no punctuation, no articles, single spaces; and in
Unicode's form NFKC, in which most vocabularies write. A score is the maximum over gold answers, from
0 to 1. Functions of `(targets, predictions)` are seqio metric functions; a target is a gold answer or
a list of them. KILT's official scores, which differ slightly, are in `glimmer_jax.metrics.kilt`.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.ids import id_number
from glimmer_jax.kilt.examples import answers, provenance, read_examples
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage.json_lines import read_json_lines

Target = str | Sequence[str]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Resampled indices held in RAM at once.
_CHUNK = 2_000_000


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: `"The  Beatles!"` -> `"beatles"`."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _comparable(text: str) -> str:
    return normalize_answer(unicodedata.normalize("NFKC", text))


def match_of(target: Target, prediction: str) -> float:
    """1.0 if the prediction equals a gold answer after normalisation, else 0.0."""
    predicted = _comparable(prediction)
    return float(any(_comparable(answer) == predicted for answer in _listed(target)))


def f1_of(target: Target, prediction: str) -> float:
    """F1 over words, from 0 to 1; the maximum over gold answers."""
    return max((_word_f1(answer, prediction) for answer in _listed(target)), default=0.0)


def _word_f1(target: str, prediction: str) -> float:
    gold, predicted = _comparable(target).split(), _comparable(prediction).split()
    if not gold or not predicted:
        return float(gold == predicted)
    common = sum((Counter(gold) & Counter(predicted)).values())
    return 2 * common / (len(gold) + len(predicted))


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """`{"exact_match": …}`, for Natural Questions, TriviaQA, HotpotQA and which function."""
    return {"exact_match": _mean(match_of, targets, predictions)}


def accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy": …}`: exact match, under the usual name for classification and slot filling."""
    return {"accuracy": _mean(match_of, targets, predictions)}


def f1(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """`{"f1": …}` over words."""
    return {"f1": _mean(f1_of, targets, predictions)}


def with_mean(metrics: Mapping[str, float]) -> dict[str, float]:
    """Adds `mean`: exact match or accuracy, averaged over tasks."""
    scores = [v for name, v in metrics.items() if name.endswith(("/exact_match", "/accuracy"))]
    return {**metrics, **({"mean": sum(scores) / len(scores)} if scores else {})}


def recall_of(gold: Sequence[bool], at: int) -> float:
    """1.0 if one of the first `at` passages is gold, else 0.0. `gold` has the best passage first."""
    return float(any(gold[:at]))


def _listed(target: Target) -> Sequence[str]:
    return [target] if isinstance(target, str) else target


def _mean(
    score: Callable[[Target, str], float], targets: Sequence[Target], predictions: Sequence[str]
) -> float:
    if len(targets) != len(predictions):
        raise ValueError(
            f"Expected one prediction per target, got {len(predictions)} predictions and "
            f"{len(targets)} targets."
        )
    # A question without answers says nothing about its prediction.
    scores = [
        score(target, text) for target, text in zip(targets, predictions, strict=True) if target
    ]
    return float(np.mean(scores)) if scores else 0.0


def bootstrap(
    scores: Any,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> dict[str, float]:
    """Mean of scores with a percentile bootstrap interval: `{"n", "mean", "low", "high"}`.

    Args:
      scores: `[n]`, converted to float64.
      seed: of the resampling.
      groups: `[n]`, the group of each score, such as the page of its question. Groups instead of
        scores are then resampled, because scores within a group are correlated.
      samples: number of resamples.
      level: coverage of the interval, between 0 and 1.

    Raises:
      ValueError: there are no scores, `groups` has another length, or `level` is out of range.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores must have shape [n] with n >= 1, got {values.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    sums: np.ndarray = values
    counts: np.ndarray = np.ones(len(values))
    if groups is not None:
        if len(groups) != len(values):
            raise ValueError(
                f"groups must have one entry per score, {len(values)}, got {len(groups)}."
            )
        _, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        sums, counts = np.bincount(member, values), np.bincount(member).astype(float)
    draw = np.random.default_rng(seed)
    size = len(sums)
    means = []
    for start in range(0, samples, max(1, _CHUNK // size)):
        STOP.poll()
        rows = min(max(1, _CHUNK // size), samples - start)
        chosen = draw.integers(0, size, (rows, size))
        means.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
    }


def paired_bootstrap(
    a: Any,
    b: Any,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> dict[str, float]:
    """Difference a - b of two systems on the same questions, with a percentile bootstrap interval.

    Pairing removes the variance due to the difficulty of the questions, so the interval is much
    narrower than those of two separate means.

    Args:
      a: scores `[n]` of the first system.
      b: scores `[n]` of the second system.
      seed: of the resampling.
      groups: as in `bootstrap`.
      samples: number of resamples.
      level: coverage of the interval, between 0 and 1.

    Returns:
      `{"n", "a", "b", "difference", "low", "high"}`, with the two means.

    Raises:
      ValueError: the shapes differ, or as in `bootstrap`.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            "Scores of the two systems must be on the same questions, got shapes "
            f"{first.shape} and {second.shape}."
        )
    interval = bootstrap(first - second, seed, groups, samples, level)
    return {
        "n": interval["n"],
        "a": float(first.mean()),
        "b": float(second.mean()),
        "difference": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
    }


def score_examples(
    examples: Sequence[dict[str, Any]], predictions: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Scores of each example that has answers, in order.

    Args:
      examples: from a task file, with `retrieved` for recall.
      predictions: id -> `{"id", "prediction": text}`, or KILT's `{"id", "output": [{"answer":
        text}]}`; with `passage_ids` or `passages` (best first) for recall.

    Returns:
      `{"exact_match", "f1", "recall_at_1", "recall_at_5": scores from 0 to 1}`; recall only for
      examples with provenance and retrieved passages that are marked as `gold` or not.

    Raises:
      ValueError: an example has no prediction.
    """
    answered = [example for example in examples if answers(example)]
    missing = [example["id"] for example in answered if example["id"] not in predictions]
    if missing:
        raise ValueError(
            f"PREDICTIONS: {len(missing)} questions have no prediction, the first is {missing[0]!r}. "
            "Rerun --run_mode=infer on the complete file."
        )
    scores: dict[str, list[float]] = {"exact_match": [], "f1": []}
    for example in answered:
        prediction = predictions[example["id"]]
        text = prediction_text(prediction)
        scores["exact_match"].append(match_of(answers(example), text))
        scores["f1"].append(f1_of(answers(example), text))
        numbers = _passage_numbers(prediction)
        marked = any("gold" in passage for passage in example.get("retrieved", ()))
        if numbers is not None and marked and provenance(example):
            gold = {id_number(x["id"]) for x in example["retrieved"] if x.get("gold")}
            marks = [number in gold for number in numbers]
            for at in (1, 5):
                scores.setdefault(f"recall_at_{at}", []).append(recall_of(marks, at))
    return scores


def prediction_text(prediction: dict[str, Any]) -> str:
    """The answer in a prediction of either form. Raises ValueError if there is none."""
    text, outputs = prediction.get("prediction"), prediction.get("output")
    if text is None and isinstance(outputs, list) and outputs and isinstance(outputs[0], dict):
        text = outputs[0].get("answer")
    if not isinstance(text, str):
        raise ValueError(
            f"PREDICTIONS: {prediction.get('id')!r} has no answer. Write a string `prediction`, or "
            "KILT's `output` with an `answer`."
        )
    return text


def _passage_numbers(prediction: dict[str, Any]) -> list[int] | None:
    """Numbers of a prediction's passages, best first; None without passages. Raises ValueError."""
    ids, passages = prediction.get("passage_ids"), prediction.get("passages")
    if ids is None and isinstance(passages, list):
        ids = [passage.get("id") if isinstance(passage, dict) else passage for passage in passages]
    try:
        if not isinstance(ids, list | None):
            raise ValueError(f"expected a list in `passage_ids`, got {ids!r:.80}")
        return None if ids is None else [id_number(name) for name in ids]
    except ValueError as error:
        raise ValueError(
            f"PREDICTIONS: {prediction.get('id')!r}: {error} Write `passage_ids`, or `passages` with an "
            "`id` each."
        ) from None


def score_file(
    prediction_path: str | Path, question_path: str | Path, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Metrics of a prediction file: `{metric: {"n", "mean", "low", "high"}}`.

    The bootstrap resamples pages, not questions.

    Args:
      prediction_path: JSON Lines of `{"id", "prediction", …}`, or KILT's format.
      question_path: labelled task file.
      seed: of the bootstrap.

    Raises:
      ValueError: a file is malformed, a prediction is repeated or missing, or no question has an
        answer.
    """
    examples = list(read_examples(question_path))
    predictions: dict[str, dict[str, Any]] = {}
    for number, line in read_json_lines(prediction_path):
        name = str(line["id"]) if type(line.get("id")) is int else line.get("id")
        if not isinstance(name, str) or name in predictions:
            raise ValueError(
                f"{prediction_path}:{number}: expected a new string `id`, got {line.get('id')!r}. Write "
                "one line per question."
            )
        predictions[name] = line
    scores = score_examples(examples, predictions)
    if not scores["exact_match"]:
        raise ValueError(f"QUESTIONS: {question_path} has no answers. Use a labelled file.")
    groups = [_page(example) for example in examples if answers(example)]
    return {
        name: bootstrap(values, seed, groups if len(values) == len(groups) else None)
        for name, values in scores.items()
    }


def _page(example: Mapping[str, Any]) -> str:
    """The first page of a question's provenance, by id or title; the question itself without one."""
    place = next(iter(provenance(example)), {})
    return str(place.get("wikipedia_id") or place.get("title") or example["id"])
