"""Questions and answers of the predictor in KILT's format."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glimmer_jax.corpus.passages import Passages

Example = dict[str, Any]


def check_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError naming the first question that is malformed, and its field."""
    for place, question in enumerate(questions):
        if not isinstance(question, Mapping):
            raise ValueError(
                f"Question {place} must be a dict with id and input, got {question!r}."
            )
        for name in ("id", "input"):
            if not isinstance(question.get(name), str):
                raise ValueError(
                    f"Question {place} needs a string as {name!r}, got {question.get(name)!r}."
                )
        try:
            question["input"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Question {place} ({question['id']!r}): input has a character that is no text "
                f"(a surrogate at position {error.start}). Decode the text as UTF-8."
            ) from None
        if "retrieved" in question and not _are_passages(question["retrieved"]):
            raise ValueError(
                f"Question {place} ({question['id']!r}): retrieved must be a list of passages, "
                f"[{{'id': 7}}, ...], got {question['retrieved']!r}. Leave it out to use BM25."
            )


def _are_passages(retrieved: Any) -> bool:
    return isinstance(retrieved, Sequence) and all(
        isinstance(passage, Mapping) and type(passage.get("id")) in (int, str)
        for passage in retrieved
    )


def record(
    question: Mapping[str, Any],
    ids: Sequence[int],
    prediction: str,
    aux: Mapping[str, np.ndarray],
    row: int,
    passages: Passages,
    texts: bool,
) -> Example:
    """The answer to a question in KILT's format, with the passages that were read, best first.

    Args:
      question: with `id` and `input`.
      ids: of the retrieved passages, by the passages folder.
      prediction: text of the answer.
      aux: arrays of the batch: `scores` `[B]`, `passage_scores` `[B, K]`, `kept_passages` `[B, m]`.
      row: of the question in the batch.
      passages: the folder.
      texts: whether the passages have their texts.
    """
    scores = aux["passage_scores"][row][: len(ids)]
    kept = set(aux["kept_passages"][row].tolist())
    # Passages missing from the memory were not read and are left out.
    order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
    rows = passages.rows(np.asarray(ids, np.int64))
    records = {place: passages.record(int(rows[place])) for place in order.tolist()}
    # A passage without a page is its own page.
    pages = {
        str(passage.get("page", passage.get("document", passage["id"]))): passage["title"]
        for passage in records.values()
    }
    return {
        "id": question["id"],
        "input": question["input"],
        "output": [
            {
                "answer": prediction,
                "provenance": [
                    {"wikipedia_id": page, "title": title} for page, title in pages.items()
                ],
            }
        ],
        "score": round(float(aux["scores"][row]), 4),
        "passages": [
            {
                "id": passage["id"],
                "title": passage["title"],
                "score": round(float(scores[place]), 4),
                "kept": place in kept,
                **({"text": passage["text"]} if texts else {}),
            }
            for place, passage in records.items()
        ],
    }


def rank(candidates: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    """`[{"answer", "score"}]` from log probabilities `[N]`, best first; ties keep their order."""
    order = np.argsort(-scores, kind="stable").tolist()
    return [{"answer": candidates[i], "score": round(float(scores[i]), 4)} for i in order]
