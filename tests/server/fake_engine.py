"""An engine without a model: answers are the question in capitals, after a set time."""

import contextlib
import threading
import time
import urllib.request

from glimmer_jax.server import run
from glimmer_jax.server.app import Server
from glimmer_jax.server.config import ServerConfig
from glimmer_jax.server.protocol import Limits, RequestError
from glimmer_jax.storage.errors import DamagedData

PASSAGES = [
    {
        "id": 0,
        "title": "<script>alert(1)</script>",
        "text": "RED <img src=x onerror=alert(1)> thing",
    },
    {"id": 1, "title": "blue", "text": "a blue thing"},
    {"id": 2, "title": "green", "text": "a green thing"},
]


class FakeEngine:
    batch_sizes = (1, 2, 4)
    num_kept = 2

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.batches = []
        self.version = 1
        self.gate = threading.Event()
        self.gate.set()

    def key(self, question):
        return question.num_kept

    def check(self, question):
        if question.retrieved and "unknown" in question.retrieved:
            raise RequestError(422, "Passage 'unknown' is not in the corpus.")

    def describe(self):
        return {"memory_version": self.version}

    def reload(self):
        self.version += 1
        return True

    def prepare(self, questions):
        if any(question.input == "withdrawn" for question in questions):
            raise ValueError("Passage 7 was withdrawn.")
        if any(question.input == "damaged" for question in questions):
            raise DamagedData("Shard 0 is damaged.")
        return self.version, questions

    def compute(self, prepared):
        version, questions = prepared
        self.gate.wait(20)
        time.sleep(self.seconds)
        if any(question.input == "bug" for question in questions):
            raise KeyError("bug")
        self.batches.append([question.input for question in questions])
        return [self._answer(question, version) for question in questions]

    def _answer(self, question, version):
        kept = question.num_kept or self.num_kept
        passages = [
            {**passage, "rank": 2 - n, "score": 1.0 - n, "kept": n < kept}
            for n, passage in enumerate(PASSAGES)
        ]
        return {
            "id": question.id,
            "input": question.input,
            "answer": question.input.upper(),
            "log_likelihood": -0.5,
            "passages": passages,
            "timings": {"retrieval": 0.001, "memory": 0.002, "read": 0.003, "decode": 0.004},
            "version": {"memory_version": version},
        }


def wait_until_ready(address, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{address}readyz"):
                return
        except OSError:  # It does not listen yet, or answers 503.
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextlib.contextmanager
def serving(token=None, seconds=0.0, **config):
    """The address of a ready server over an engine without a model."""
    limits = Limits(passages=3, kept=(1, 2))
    server = Server(FakeEngine(seconds), limits, ServerConfig(**config), token)
    listener, stop = run.bind("127.0.0.1", 0), threading.Event()
    thread = threading.Thread(
        target=run.run, args=(server, listener, lambda: None, stop.is_set, 5.0)
    )
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    try:
        wait_until_ready(address)
        yield address
    finally:
        stop.set()
        thread.join()
