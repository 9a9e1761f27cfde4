"""The OpenAPI 3.1 document of the server."""

from typing import Any

from glimmer_jax import __version__
from glimmer_jax.server.protocol import Limits


def openapi(limits: Limits, secured: bool) -> dict[str, Any]:
    """The document for a server with these limits; `secured` if it requires a token."""
    errors = {
        "400": _failure("The body is not a JSON object."),
        "413": _failure("The body is too large."),
        "422": _failure("A field is missing, unknown, of the wrong type or out of bounds."),
        "429": _failure("The queue is full; see Retry-After.", retry=True),
        "500": _failure("Internal error."),
        "503": _failure("The server is warming up or stopping.", retry=True),
        "504": _failure("No answer in time."),
    }
    if secured:
        errors["401"] = _failure("The bearer token is missing or wrong.")
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "glimmer_jax", "version": __version__},
        "paths": {
            "/v1/answers": {
                "post": {
                    "summary": "Answers questions",
                    "requestBody": {"required": True, "content": _json(_ref("Request"))},
                    "responses": {"200": _success("Answers, in order", "Answers"), **errors},
                }
            },
            "/v1/info": {
                "get": {
                    "summary": "Versions of model and stores, and limits",
                    "responses": {"200": {"description": "Information", "content": _json({})}},
                }
            },
            "/v1/reload": {
                "post": {
                    "summary": "Opens the newest version of passages and memory",
                    "responses": {
                        "200": {"description": "Opened", "content": _json({})},
                        "409": _failure("The newest version cannot be served."),
                        "503": _failure(
                            "The server is not ready, or the storage did not answer.", retry=True
                        ),
                    },
                }
            },
            "/healthz": _probe("Whether the process is alive"),
            "/readyz": _probe("Whether questions are answered"),
            "/metrics": _probe("Prometheus metrics"),
        },
        "components": {"schemas": _schemas(limits)},
    }
    if secured:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _schemas(limits: Limits) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": limits.characters}
    identifier = {"oneOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]}
    question = {
        "type": "object",
        "required": ["input"],
        "additionalProperties": False,
        "properties": {
            "id": text,
            "input": text,
            "retrieved": {"type": "array", "maxItems": limits.passages, "items": identifier},
        },
    }
    shared: dict[str, Any] = {
        "num_passages": {"type": "integer", "minimum": 1, "maximum": limits.passages},
        "rerank": {
            "type": "boolean",
            "default": True,
            "description": "false reads the retriever's first passages instead of the reranker's.",
        },
        "include_text": {"type": "boolean", "default": False},
    }
    if limits.candidates:
        shared["candidates"] = {
            "type": "array",
            "minItems": 1,
            "maxItems": limits.candidates,
            "items": text,
            "description": "The only answers allowed; the most probable one is given.",
        }
    if limits.kept:
        shared["num_kept"] = {"type": "integer", "enum": list(limits.kept)}
    passage = {
        "id": identifier,
        "title": {"type": "string"},
        "rank": {"type": "integer", "description": "The retriever's rank, from 0."},
        "score": {"type": "number"},
        "kept": {"type": "boolean"},
        "text": {"type": "string"},
    }
    answer = {
        "id": {"type": "string"},
        "input": {"type": "string"},
        "answer": {"type": "string"},
        "log_likelihood": {"type": "number", "description": "nats"},
        "candidates": {"type": "array", "items": {"type": "object"}},
        "passages": {"type": "array", "items": {"type": "object", "properties": passage}},
        "timings": {"type": "object", "additionalProperties": {"type": "number"}},
        "version": {"type": "object"},
    }
    return {
        "Request": {
            "type": "object",
            "required": ["questions"],
            "additionalProperties": False,
            "properties": {
                "questions": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": limits.questions,
                    "items": {"oneOf": [text, question]},
                },
                **shared,
            },
        },
        "Answers": {
            "type": "object",
            "properties": {
                "answers": {"type": "array", "items": {"type": "object", "properties": answer}}
            },
        },
        "Error": {
            "type": "object",
            "properties": {
                "error": {
                    "type": "object",
                    "properties": {
                        "status": {"type": "integer"},
                        "message": {"type": "string"},
                    },
                }
            },
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _success(description: str, name: str) -> dict[str, Any]:
    return {"description": description, "content": _json(_ref(name))}


def _failure(description: str, retry: bool = False) -> dict[str, Any]:
    response: dict[str, Any] = {"description": description, "content": _json(_ref("Error"))}
    if retry:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return response


def _probe(summary: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": "Yes"}}}}
