"""How good answers are: exact match, F1, recall of passages, and paired bootstrap intervals.

Answers are compared as SQuAD does: lower case, no punctuation, no articles, single spaces; the best
of several gold answers counts. KILT's official scores differ here and there, and are in
`glimmer_jax.metrics.kilt`. All scores are fractions from 0 to 1. The functions of
`(targets, predictions)` are metric functions for seqio as they stand; a target is a gold answer or a
list of them.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.ids import id_number
from glimmer_jax.kilt.examples import answers, provenance, read_examples
from glimmer_jax.storage.json_lines import read_json_lines

Target = str | Sequence[str]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Resampled indices held at once.
_CHUNK = 2_000_000


def normalize_answer(text: str) -> str:
    """`"The  Beatles!"` -> `"beatles"`."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def match_of(target: Target, prediction: str) -> float:
    """1.0 where the prediction equals a gold answer after normalisation."""
    wanted = normalize_answer(prediction)
    return float(any(normalize_answer(one) == wanted for one in _listed(target)))


def f1_of(target: Target, prediction: str) -> float:
    """Overlap of words with the best gold answer: harmonic mean of precision and recall."""
    return max((_word_f1(one, prediction) for one in _listed(target)), default=0.0)


def _word_f1(target: str, prediction: str) -> float:
    wanted, got = normalize_answer(target).split(), normalize_answer(prediction).split()
    if not wanted or not got:
        return float(wanted == got)
    common = sum((Counter(wanted) & Counter(got)).values())
    return 2 * common / (len(wanted) + len(got))


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """`{"exact_match": …}`: open questions (Natural Questions, TriviaQA, HotpotQA, which function)."""
    return {"exact_match": _mean(match_of, targets, predictions)}


def accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """`{"accuracy": …}`: exact match under the name used for classes and slots."""
    return {"accuracy": _mean(match_of, targets, predictions)}


def f1(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """`{"f1": …}` over words."""
    return {"f1": _mean(f1_of, targets, predictions)}


def with_mean(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics with `mean`: right answers (exact match or accuracy), averaged over tasks."""
    right = [v for name, v in metrics.items() if name.endswith(("/exact_match", "/accuracy"))]
    return {**metrics, **({"mean": sum(right) / len(right)} if right else {})}


def recall_of(gold: Sequence[bool], at: int) -> float:
    """1.0 where one of the first `at` passages, best first, is gold."""
    return float(any(gold[:at]))


def recall_at(gold: Sequence[Sequence[bool]], at: int) -> dict[str, float]:
    """`{"recall_at_N": …}` from each question's marks, best passage first."""
    if at < 1:
        raise ValueError(f"Recall wants at 1 or more, got {at}.")
    marks = [recall_of(one, at) for one in gold]
    return {f"recall_at_{at}": float(np.mean(marks)) if marks else 0.0}


def _listed(target: Target) -> Sequence[str]:
    return [target] if isinstance(target, str) else target


def _mean(
    score: Callable[[Target, str], float], targets: Sequence[Target], predictions: Sequence[str]
) -> float:
    if len(targets) != len(predictions):
        raise ValueError(
            f"Wanted as many predictions as targets, got {len(predictions)} and {len(targets)}."
        )
    scores = [score(target, one) for target, one in zip(targets, predictions, strict=True)]
    return float(np.mean(scores)) if scores else 0.0


def bootstrap(
    scores: Any,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
    samples: int = 10_000,
    level: float = 0.95,
) -> dict[str, float]:
    """Mean of scores `[n]` with a percentile interval: `{"n", "mean", "low", "high"}`.

    `groups` names what each score belongs to (the page of its question, say): then whole groups are
    resampled, since questions on one page succeed and fail together.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"Wanted a list of scores, one or more, got shape {values.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    sums: np.ndarray = values
    counts: np.ndarray = np.ones(len(values))
    if groups is not None:
        if len(groups) != len(values):
            raise ValueError(f"Wanted {len(values)} groups, one a score, got {len(groups)}.")
        _, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        sums, counts = np.bincount(member, values), np.bincount(member).astype(float)
    draw = np.random.default_rng(seed)
    size = len(sums)
    means = []
    for start in range(0, samples, max(1, _CHUNK // size)):
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
    """Difference a - b of two systems on the same questions, with a percentile interval.

    Returns `{"n", "a", "b", "difference", "low", "high"}`; `groups` as in `bootstrap`. The pairing
    takes out how hard the questions are, so the interval is much narrower than the two apart.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            "Wanted two systems' scores on the same questions, got shapes "
            f"{first.shape} and {second.shape}."
        )
    found = bootstrap(first - second, seed, groups, samples, level)
    return {
        "n": found["n"],
        "a": float(first.mean()),
        "b": float(second.mean()),
        "difference": found["mean"],
        "low": found["low"],
        "high": found["high"],
    }


def score_examples(
    examples: Sequence[dict[str, Any]], predictions: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Scores of each example that has answers, in order; keys `exact_match`, `f1`, `recall_at_1`, …

    A prediction is `{"id", "prediction": text}`, or KILT's `{"id", "output": [{"answer": text}]}`.
    With `passage_ids` or `passages` (`infer`'s), best first, and marks in the example's `retrieved`,
    recall counts too.
    Raises ValueError naming examples that have no prediction.
    """
    asked = [example for example in examples if answers(example)]
    missing = [example["id"] for example in asked if example["id"] not in predictions]
    if missing:
        raise ValueError(
            f"{len(missing)} questions have no prediction, the first is {missing[0]!r}. Predict on "
            "the same file, to its end."
        )
    scores: dict[str, list[float]] = {"exact_match": [], "f1": []}
    for example in asked:
        prediction = predictions[example["id"]]
        text = prediction_text(prediction)
        scores["exact_match"].append(match_of(answers(example), text))
        scores["f1"].append(f1_of(answers(example), text))
        ids = prediction.get("passage_ids")
        if ids is None and "passages" in prediction:
            ids = [one["id"] for one in prediction["passages"]]
        if ids is not None and "retrieved" in example and provenance(example):
            gold = {id_number(one["id"]) for one in example["retrieved"] if one.get("gold")}
            marks = [id_number(one) in gold for one in ids]
            for at in (1, 5):
                scores.setdefault(f"recall_at_{at}", []).append(recall_of(marks, at))
    return scores


def prediction_text(prediction: dict[str, Any]) -> str:
    """The answer in a prediction of either form. Raises ValueError where there is none."""
    text = prediction.get("prediction")
    if text is None and prediction.get("output"):
        text = prediction["output"][0].get("answer")
    if not isinstance(text, str):
        raise ValueError(
            f"Prediction {prediction.get('id')!r} has no answer. Wanted a string `prediction`, or "
            "KILT's `output` with an `answer`."
        )
    return text


def score_file(
    prediction_path: str | Path, question_path: str | Path, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Metrics of a prediction file, each `{"n", "mean", "low", "high"}`, pages resampled whole.

    Raises ValueError for malformed files, predictions given twice, and questions without one.
    """
    examples = list(read_examples(question_path))
    predictions: dict[str, dict[str, Any]] = {}
    for number, line in read_json_lines(prediction_path):
        if not isinstance(line.get("id"), str) or line["id"] in predictions:
            raise ValueError(
                f"{prediction_path}:{number}: wanted a string `id` not given before, got "
                f"{line.get('id')!r}. One line for each question."
            )
        predictions[line["id"]] = line
    scores = score_examples(examples, predictions)
    if not scores["exact_match"]:
        raise ValueError(f"{question_path} has no answers to score against. Give a labelled file.")
    pages = {
        example["id"]: str((provenance(example) or [{}])[0].get("wikipedia_id", example["id"]))
        for example in examples
        if answers(example)
    }
    groups = list(pages.values())
    return {
        name: bootstrap(values, seed, groups if len(values) == len(groups) else None)
        for name, values in scores.items()
    }
