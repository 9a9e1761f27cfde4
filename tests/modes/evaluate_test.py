"""Mode `eval`: batches are built ahead, and the rate counts waiting for them."""

import threading
import time

import numpy as np
import pytest

from glimmer_jax.modes.evaluate import _Throughput, _write


class Predictor:
    """Answers nothing."""

    def __init__(self):
        self.seen = []

    def prefetch(self, batches):
        return iter(batches)

    def predict(self, batch):
        self.seen.append(batch["number"])
        return np.zeros((2, 1), np.int32), {}


def test_answers_of_a_replaced_evaluation_are_removed(tmp_path):
    _write(
        str(tmp_path),
        {"nq": [{"id": "a"}], "trex": [{"id": "b"}]},
        {"nq/em": 0.5, "trex/em": 0.4, "mean": 0.45},
        "X = 1",
    )
    # Mode infer may write into the same folder.
    (tmp_path / "predictions-fever.jsonl").write_text("of infer")
    _write(str(tmp_path), {"nq": [{"id": "a"}]}, {"nq/em": 0.6}, "X = 2")
    names = {path.name for path in tmp_path.iterdir()} - {"config.gin", "metrics.json"}
    assert names == {"predictions-nq.jsonl", "predictions-fever.jsonl"}
    (tmp_path / "metrics.json").write_text("{")
    _write(str(tmp_path), {"nq": [{"id": "a"}]}, {"nq/em": 0.6}, "X = 2")


def batches(count, slow=None, error=None):
    for number in range(count):
        time.sleep(1.0 if number == slow else 0.0)
        yield {"number": number, "question_tokens": np.ones((2, 3), np.int32)}
    if error is not None:
        raise error


def run(throughput, source):
    for batch in throughput.prefetch(source):
        throughput.predict(batch)


@pytest.fixture
def started():
    """Threads that have started since, and run."""
    before = set(threading.enumerate())
    return lambda: set(threading.enumerate()) - before


def test_batches_keep_their_order_and_waiting_counts(started):
    throughput = _Throughput(predictor := Predictor(), None)
    run(throughput, batches(5, slow=3))
    assert predictor.seen == list(range(5)) and not started()
    # All but the first batch, whose compilation is not counted: eight questions in about a second.
    assert throughput.answered == 8 and throughput.rate < 8 / 0.3


def test_an_error_of_the_questions_is_raised_where_its_batch_would_have_come(started):
    throughput = _Throughput(predictor := Predictor(), None)
    with pytest.raises(ValueError, match="line 7"):
        run(throughput, batches(2, error=ValueError("line 7")))
    assert predictor.seen == [0, 1] and not started()


def test_closing_ends_the_thread(started):
    ready = _Throughput(Predictor(), None).prefetch(batches(9))
    next(ready)
    assert started()
    ready.close()
    assert not started()
