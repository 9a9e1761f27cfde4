"""The JSON of `POST /v1/answers`: what a request may hold, and how a mistake is reported.

    {"questions": ["who wrote it", {"id": "q2", "input": "when", "retrieved": ["p7", 12]}],
     "candidates": ["yes", "no"], "num_passages": 10, "num_kept": 3, "rerank": true,
     "include_text": false}

Only `questions` is required. Every other field applies to all questions of the request.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

PassageId = int | str


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds on one request; larger requests are rejected before any work starts."""

    body_bytes: int = 1 << 20
    questions: int = 64  # questions per request
    characters: int = 20_000  # characters per question or candidate
    candidates: int = 2  # candidates per request; 0 if none are accepted
    passages: int = 10  # K: passages per question
    kept: tuple[int, ...] = ()  # compiled values of m; empty for models that keep every passage


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and how it is to be answered."""

    id: str
    input: str
    retrieved: tuple[PassageId, ...] | None = None  # None: the server retrieves
    candidates: tuple[str, ...] | None = None  # None: the model generates the answer
    num_passages: int | None = None  # None: K
    num_kept: int | None = None  # None: the model's m
    rerank: bool = True  # False: the retriever's first m passages are read


@dataclasses.dataclass(frozen=True)
class AnswerRequest:
    """A checked request."""

    questions: tuple[Question, ...]
    include_text: bool = False


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
      status: HTTP status code.
      retry_after: seconds after which a retry may succeed, or None.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def parse(body: bytes, limits: Limits) -> AnswerRequest:
    """Checks a request's body.

    Args:
      body: UTF-8 JSON.
      limits: upper bounds.

    Raises:
      RequestError: 400 for a body that is not a JSON object, 413 for one that is too large, and 422
        for fields that are missing, unknown, of the wrong type or out of bounds.
    """
    if len(body) > limits.body_bytes:
        raise RequestError(
            413, f"The body has {len(body)} bytes; at most {limits.body_bytes} are accepted."
        )
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise RequestError(400, f"The body must be a JSON object, got {_kind(data)}.")
    known = ("questions", *_SHARED, "include_text")
    if unknown := sorted(set(data) - set(known)):
        raise RequestError(422, f"Unknown field {unknown[0]!r}; known: {', '.join(known)}.")
    raw = data.get("questions")
    if not isinstance(raw, list) or not raw:
        raise RequestError(422, f"questions must be a non-empty list, got {_kind(raw)}.")
    if len(raw) > limits.questions:
        raise RequestError(
            422, f"questions holds {len(raw)} items; at most {limits.questions} are accepted."
        )
    shared = {
        "candidates": _candidates(data.get("candidates"), limits),
        "num_passages": _number("num_passages", data.get("num_passages"), limits.passages),
        "num_kept": _kept(data.get("num_kept"), limits),
        "rerank": _boolean("rerank", data.get("rerank", True)),
    }
    questions = [_question(number, item, limits, shared) for number, item in enumerate(raw)]
    return AnswerRequest(
        tuple(questions), _boolean("include_text", data.get("include_text", False))
    )


_SHARED = ("candidates", "num_passages", "num_kept", "rerank")


def _question(number: int, item: Any, limits: Limits, shared: Mapping[str, Any]) -> Question:
    where = f"questions[{number}]"
    if isinstance(item, str):
        item = {"input": item}
    if not isinstance(item, dict):
        raise RequestError(422, f"{where} must be a string or an object, got {_kind(item)}.")
    if unknown := sorted(set(item) - {"id", "input", "retrieved"}):
        raise RequestError(
            422, f"{where} has the unknown field {unknown[0]!r}; known: id, input, retrieved."
        )
    identifier = item.get("id", str(number))
    if not isinstance(identifier, str):
        raise RequestError(422, f"{where}.id must be a string, got {_kind(identifier)}.")
    retrieved = item.get("retrieved")
    if retrieved is not None:
        if not isinstance(retrieved, list) or not all(map(_is_passage_id, retrieved)):
            raise RequestError(422, f"{where}.retrieved must be a list of passage ids.")
        if len(retrieved) > limits.passages:
            raise RequestError(
                422,
                f"{where}.retrieved names {len(retrieved)} passages; at most {limits.passages} "
                "are read.",
            )
        retrieved = tuple(retrieved)
    text = _text(f"{where}.input", item.get("input"), limits)
    return Question(_text(f"{where}.id", identifier, limits), text, retrieved, **shared)


def _is_passage_id(value: Any) -> bool:
    if isinstance(value, str):
        return _encodable(value)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _candidates(value: Any, limits: Limits) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise RequestError(422, f"candidates must be a non-empty list, got {_kind(value)}.")
    if len(value) > limits.candidates:
        raise RequestError(
            422,
            f"candidates holds {len(value)} items; this server accepts at most {limits.candidates} "
            "(MAX_CANDIDATES).",
        )
    return tuple(_text(f"candidates[{n}]", item, limits) for n, item in enumerate(value))


def _kept(value: Any, limits: Limits) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or value not in limits.kept:
        allowed = ", ".join(map(str, limits.kept)) or "none, since this model keeps every passage"
        raise RequestError(
            422, f"num_kept must be a compiled value ({allowed}), got {value!r:.40}."
        )
    return int(value)


def _number(name: str, value: Any, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RequestError(422, f"{name} must be an integer from 1 to {most}, got {value!r:.40}.")
    return value


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(422, f"{name} must be true or false, got {_kind(value)}.")
    return value


def _text(name: str, value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "an empty string" if isinstance(value, str) else _kind(value)
        raise RequestError(422, f"{name} must be a non-empty string, got {found}.")
    if len(value) > limits.characters:
        raise RequestError(
            422, f"{name} has {len(value)} characters; at most {limits.characters} are accepted."
        )
    if not _encodable(value):
        raise RequestError(422, f"{name} holds a lone surrogate, which is not valid Unicode.")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"
