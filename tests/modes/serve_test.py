"""The command `--run_mode=serve` over a socket: answers, and a stop that drains."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

pytest.importorskip("uvicorn")

from glimmer_jax import shipped
from glimmer_jax.modes.serve import batch_sizes
from tests.children import running
from tests.serving.predictor_test import corpus  # noqa: F401 - a fixture

LENGTHS = {"inputs": 12, "targets": 6, "passages": (2, 12)}


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [
        (1, 8, [1, 2, 4, 8]),
        (2, 8, [2, 4, 8]),
        (8, 8, [8]),
        (1, 12, [1, 3, 6, 12]),
        (4, 12, [4, 12]),
        (1, 7, [1, 7]),
    ],
)
def test_the_largest_batch_is_halved_as_long_as_the_devices_divide_it(smallest, largest, sizes):
    assert batch_sizes(smallest, largest) == sizes


@contextlib.contextmanager
def serving(corpus, *bindings):  # noqa: F811
    """(process, lines of its output so far) of a server for the shipped GLIMMER on three passages."""
    checkpoint = shipped.CHECKPOINTS / "pydocs_glimmer.safetensors"
    argv = [
        *(sys.executable, "-m", "glimmer_jax.main", "--run_mode=serve"),
        "--gin_file=gin/examples/pydocs_glimmer_serve.gin",
        *(f"--gin.CHECKPOINT_PATH='{checkpoint}'", f"--gin.PASSAGES_DIR='{corpus}'"),
        *(f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}", "--gin.BATCH_SIZE=8", "--gin.KEPT_CHOICES=()"),
        *("--gin.PORT=0", *bindings),
    ]
    lines = []
    with running(
        argv, cwd=shipped.root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reader.start()
        yield process, lines
        reader.join(10)


def address(process, lines):
    """The server's URL, once it is ready."""
    for _ in range(2400):
        text = "".join(lines)
        assert process.poll() is None, text
        if "Ready." in text:
            return re.search(r"http://[\d.]+:\d+", text)[0]
        threading.Event().wait(0.1)
    raise AssertionError("".join(lines))


def post(url, body, timeout=60):
    request = urllib.request.Request(f"{url}/v1/answers", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


@pytest.mark.timeout(400)
def test_the_command_answers_and_drains_at_sigterm(corpus):  # noqa: F811
    with serving(corpus, "--gin.MAX_BATCH_DELAY_MS=1500") as (process, lines):
        url = address(process, lines)
        answers = post(url, {"questions": ["red thing", "green thing"]})["answers"]
        for answer in answers:
            assert {passage["title"] for passage in answer["passages"]} <= {"red", "green", "blue"}
        last = []
        body = {"questions": ["blue thing"]}
        client = threading.Thread(target=lambda: last.append(post(url, body)))
        client.start()
        threading.Event().wait(0.5)  # it waits for others to share its batch
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines)
        client.join()
        assert last[0]["answers"][0]["input"] == "blue thing"
        with pytest.raises(urllib.error.URLError):
            post(url, body, timeout=5)
    assert not any("Traceback" in line for line in lines), "".join(lines)


@pytest.mark.parametrize(
    ("binding", "facts"),
    [
        ("--gin.PORT=65536", ("PORT", "65536")),
        ("--gin.TOKEN_FILE='missing'", ("TOKEN_FILE", "missing")),
        ("--gin.HOST='192.0.2.1'", ("HOST", "192.0.2.1")),
    ],
)
def test_invalid_settings_raise_before_the_model_is_loaded(corpus, binding, facts):  # noqa: F811
    with serving(corpus, binding) as (process, lines):
        assert process.wait(120) == 2
    text = "".join(lines)
    assert all(fact in text for fact in facts) and "Traceback" not in text, text
