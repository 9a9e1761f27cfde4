"""The HTTP interface over an engine without a model."""

import dataclasses
import json
import os
import string

import hypothesis
import pytest
from hypothesis import strategies as st

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from glimmer_jax.server.app import Server
from glimmer_jax.server.config import TOKEN_VARIABLE, ServerConfig
from glimmer_jax.server.openapi import openapi
from glimmer_jax.server.protocol import Limits, RequestError
from glimmer_jax.storage.errors import StorageError
from tests.server.fake_engine import FakeEngine

LIMITS = Limits(body_bytes=2000, questions=4, characters=100, candidates=3, passages=3, kept=(1, 2))


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def served(engine):
    """(client, server)."""
    yield from serving(engine)


def serving(engine, token=None, **settings):
    server = Server(engine, LIMITS, ServerConfig(max_batch_delay_ms=1, **settings), token)
    server.ready = True
    with server.batcher, TestClient(server.app) as client:
        yield client, server


@pytest.fixture
def client(served):
    return served[0]


def ask(client, *questions, **fields):
    return client.post("/v1/answers", json={"questions": list(questions), **fields})


def test_answers_come_in_order_with_passages_versions_and_timings(client):
    response = ask(client, "red", {"id": "q2", "input": "blue", "retrieved": [1, "x"]})
    assert response.status_code == 200
    first, second = response.json()["answers"]
    assert (first["id"], first["answer"]) == ("0", "RED")
    assert (second["id"], second["answer"]) == ("q2", "BLUE")
    assert [p["kept"] for p in first["passages"]] == [True, True, False]
    assert "text" not in first["passages"][0] and first["passages"][1]["title"] == "blue"
    assert set(first["timings"]) == {"queue", "retrieval", "memory", "read", "decode"}
    assert first["version"] == {"memory_version": 1}


def test_texts_come_on_request(client):
    (answer,) = ask(client, "red", include_text=True).json()["answers"]
    assert answer["passages"][1]["text"] == "a blue thing"


@pytest.mark.parametrize(
    ("status", "fields", "facts"),
    [
        (422, {}, ("questions",)),
        (422, {"questions": []}, ("questions",)),
        (422, {"questions": ["a"] * 5}, ("5", "4")),
        (422, {"questions": [" "]}, ("questions[0].input",)),
        (422, {"questions": ["x" * 101]}, ("101", "100")),
        (422, {"questions": ["\ud800"]}, ("surrogate",)),
        (422, {"questions": [{"id": 7, "input": "a"}]}, ("questions[0].id", "a number")),
        (422, {"questions": [{"input": "a", "retrieved": 7}]}, ("retrieved",)),
        (422, {"questions": [{"input": "a", "retrieved": [1, 2, 3, 4]}]}, ("4", "3")),
        (422, {"questions": [{"input": "a", "retrieved": [-1]}]}, ("retrieved",)),
        (422, {"questions": [{"input": "a", "retrieved": ["unknown"]}]}, ("unknown",)),
        (422, {"questions": [{"input": "a", "question": "b"}]}, ("question", "input")),
        (422, {"questions": ["a"], "candidates": []}, ("candidates",)),
        (422, {"questions": ["a"], "candidates": ["x"] * 4}, ("4", "3")),
        (422, {"questions": ["a"], "num_passages": 4}, ("num_passages", "4", "3")),
        (422, {"questions": ["a"], "num_kept": 3}, ("num_kept", "1, 2", "3")),
        (422, {"questions": ["a"], "num_kept": True}, ("num_kept",)),
        (422, {"questions": ["a"], "num_kept": [1]}, ("num_kept",)),
        (422, {"questions": ["a"], "rerank": 1}, ("rerank", "a number")),
        (422, {"questions": ["a"], "topk": 1}, ("topk",)),
        (413, {"questions": ["a"], "pad": "x" * 2000}, ("2000",)),
    ],
)
def test_an_invalid_request_reports_the_field_and_the_bound(client, status, fields, facts):
    response = client.post("/v1/answers", content=json.dumps(fields))
    assert response.status_code == status
    error = response.json()["error"]
    assert error["status"] == status
    assert all(fact in error["message"] for fact in facts), error["message"]


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b"[" * 1900, b'{"questions": NaN'])
def test_a_body_that_is_no_json_object_is_a_400(client, body):
    response = client.post("/v1/answers", content=body)
    assert response.status_code == 400 and response.json()["error"]["status"] == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = ("questions", "candidates", "num_passages", "num_kept", "rerank", "include_text")


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    st.dictionaries(st.sampled_from(NAMES), JSON | st.lists(st.text(min_size=1, max_size=5)))
)
def test_no_body_gives_a_500(body):
    engine = FakeEngine()
    for client, _ in serving(engine):
        response = client.post("/v1/answers", content=json.dumps(body))
        assert response.status_code in (200, 400, 413, 422), response.text


def test_probes_follow_warm_up_and_stop(served):
    client, server = served
    server.ready = False
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert ask(client, "a").status_code == 503
    server.ready = True
    assert client.get("/readyz").status_code == 200
    server.stopping = True
    assert client.get("/readyz").status_code == 503
    response = ask(client, "a")
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == 200


def test_a_full_queue_is_a_429_with_retry_after(engine):
    for client, server in serving(engine, max_queue=2):
        assert ask(client, "a", "b").status_code == 200
        # It would never fit.
        response = ask(client, "a", "b", "c")
        assert response.status_code == 422 and "at most 2 questions, got 3" in response.text
        with server.batcher._changed:  # Its thread takes none meanwhile.
            server.batcher._waiting.extend([None, None])
            with pytest.raises(RequestError) as full:
                server.batcher.check_room(1)
            server.batcher._waiting.clear()

        def no_room(count):
            raise full.value

        server.batcher.check_room = no_room
        response = ask(client, "a")
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1


def test_a_question_without_an_answer_in_time_is_a_504(engine):
    engine.seconds = 0.5
    for client, _ in serving(engine, request_timeout=0.1):
        assert ask(client, "a").status_code == 504


def test_a_reload_changes_the_version_that_answers_name(client):
    assert ask(client, "a").json()["answers"][0]["version"] == {"memory_version": 1}
    assert client.post("/v1/reload").json() == {"changed": True, "version": {"memory_version": 2}}
    assert ask(client, "a").json()["answers"][0]["version"] == {"memory_version": 2}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("Shard 0 is damaged."), 409),
        (StorageError("gs://b/m: permission denied"), 409),
        (ConnectionResetError("by peer"), 503),
    ],
)
def test_a_reload_that_fails_keeps_the_old_version(engine, client, error, status):
    def fail():
        raise error

    engine.reload = fail
    answer = client.post("/v1/reload")
    assert answer.status_code == status and "The old version stays in use" in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)
    assert ask(client, "a").json()["answers"][0]["version"] == {"memory_version": 1}


def test_a_token_guards_everything_but_page_and_probes(engine):
    for client, _ in serving(engine, token="secret"):
        assert ask(client, "a").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/openapi.json").status_code == 401
        for path in ("/", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        wrong = {"authorization": "Bearer secre\u00e9".encode("latin-1")}
        assert client.get("/v1/info", headers=wrong).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert ask(client, "a").status_code == 200


def test_metrics_count_requests_stages_and_batches(client):
    ask(client, "a", "b")
    ask(client)
    text = client.get("/metrics").text
    for line in (
        'glimmer_requests_total{path="/v1/answers",status="200"} 1.0',
        'glimmer_requests_total{path="/v1/answers",status="422"} 1.0',
        'glimmer_stage_seconds_count{stage="decode"} 2.0',
        "glimmer_queue_length 0.0",
        "glimmer_batch_size_sum 2.0",
        "glimmer_memory_cache_hits_total",
    ):
        assert line in text, line


def test_unknown_paths_and_methods_are_json_errors(client):
    assert client.get("/nothing").json()["error"]["status"] == 404
    response = client.get("/v1/answers")
    assert response.status_code == 405 and response.json()["error"]["status"] == 405


def test_paths_do_not_grow_the_metrics(client):
    for n in range(3):
        client.get(f"/nothing{n}")
    assert "/nothing" not in client.get("/metrics").text


def test_the_log_contains_questions_only_if_enabled(engine, caplog):
    caplog.set_level("INFO", "glimmer_jax.server.app")
    for client, _ in serving(engine):
        ask(client, "secret question\nforged=line")
    assert "secret" not in caplog.text and "questions=1" in caplog.text
    for client, _ in serving(engine, log_questions=True, log_json=True):
        ask(client, "secret question\nforged=line")
    record = json.loads(caplog.records[-1].getMessage())
    assert record["questions"] == ["secret question\nforged=line"] and record["status"] == 200


def test_cors_is_off_unless_origins_are_given(engine):
    origin = {"origin": "https://a.example"}
    for client, _ in serving(engine):
        assert "access-control-allow-origin" not in client.get("/healthz", headers=origin).headers
    for client, _ in serving(engine, cors_origins=("https://a.example",)):
        headers = client.get("/healthz", headers=origin).headers
        assert headers["access-control-allow-origin"] == "https://a.example"


def test_the_page_loads_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http://" not in response.text and "https://" not in response.text


def test_the_openapi_document_describes_the_routes(client):
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        *("/v1/answers", "/v1/info", "/v1/reload", "/healthz", "/readyz", "/metrics"),
    }
    request = document["components"]["schemas"]["Request"]["properties"]
    assert request["questions"]["maxItems"] == 4 and request["num_kept"]["enum"] == [1, 2]
    assert request["candidates"]["maxItems"] == 3
    none = openapi(dataclasses.replace(LIMITS, candidates=0), secured=False)
    assert "candidates" not in none["components"]["schemas"]["Request"]["properties"]
    answers = document["paths"]["/v1/answers"]["post"]["responses"]
    assert {"200", "400", "413", "422", "429", "503"} <= set(answers)


@pytest.mark.parametrize(
    ("macro", "setting", "value"),
    [
        ("MAX_QUEUE", "max_queue", 0),
        ("REQUEST_SECONDS", "request_timeout", 0),
        ("DRAIN_SECONDS", "drain_timeout", -1),
        ("MAX_BATCH_DELAY_MS", "max_batch_delay_ms", -0.1),
        ("PORT", "port", 65536),
        ("CORS_ORIGINS", "cors_origins", "https://a.example"),
    ],
)
def test_settings_out_of_bounds_are_rejected_by_macro(macro, setting, value):
    with pytest.raises(ValueError, match=f"{macro}.*{value}"):
        ServerConfig(**{setting: value})


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert ServerConfig().token() is None
    # As a secret made with `echo | base64` is.
    monkeypatch.setenv(TOKEN_VARIABLE, "from-environment\n")
    assert ServerConfig().token() == "from-environment"
    monkeypatch.setenv(TOKEN_VARIABLE, "\u00e9")
    with pytest.raises(ValueError, match=f"{TOKEN_VARIABLE} must hold one line"):
        ServerConfig().token()
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert ServerConfig(token_file=str(file)).token() == "from-file"
    for content in ("", "two\nlines", "\u00e9"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="TOKEN_FILE"):
            ServerConfig(token_file=str(file)).token()
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe"):
        with pytest.raises(ValueError, match="TOKEN_FILE"):
            ServerConfig(token_file=str(tmp_path / name)).token()
