"""Questions that arrive together share batches; places are freed; one fault fails one question."""

import asyncio
import time

import pytest

from glimmer_jax.server.batching import Batcher
from glimmer_jax.server.protocol import Question, RequestError
from tests.server.fake_engine import FakeEngine


class Observer:
    def __init__(self):
        self.lengths, self.sizes = [], []

    def queued(self, length):
        self.lengths.append(length)

    def computed(self, size, seconds):
        self.sizes.append(size)


def asked(text, **settings):
    return Question(text, text, **settings)


def run(work, engine=None, max_delay=0.2, max_queue=100):
    engine = engine or FakeEngine()
    observer = Observer()
    with Batcher(engine, max_delay, max_queue, observer) as batcher:
        result = asyncio.run(work(batcher, engine))
    assert not observer.lengths or observer.lengths[-1] == 0
    return result, engine, observer


def test_questions_that_arrive_together_share_a_batch():
    async def work(batcher, engine):
        return await asyncio.gather(*(batcher.answer(asked(t), 10) for t in "abcd"))

    answers, engine, observer = run(work, max_delay=5)
    assert [answer["answer"] for answer in answers] == list("ABCD")
    assert engine.batches == [list("abcd")] and observer.sizes == [4]
    assert all(answer["timings"]["queue"] >= 0 for answer in answers)


def test_a_lone_question_waits_no_longer_than_the_delay():
    async def work(batcher, engine):
        return await batcher.answer(asked("a"), 10)

    answer, engine, _ = run(work, max_delay=0.05)
    assert answer["answer"] == "A" and engine.batches == [["a"]]


def test_a_question_waits_only_for_as_many_as_the_last_batch_had():
    async def work(batcher, engine):
        queues = []
        for texts in ("ab", "c", "d", "efg"):
            answers = await asyncio.gather(*(batcher.answer(asked(t), 10) for t in texts))
            queues.append(answers[0]["timings"]["queue"])
        return queues

    (first, second, third, last), engine, _ = run(work, max_delay=0.5)
    assert engine.batches == [["a", "b"], ["c"], ["d"], ["e", "f", "g"]]
    assert min(first, second) >= 0.5 and max(third, last) < 0.4


@pytest.mark.parametrize(("seconds", "batches"), [({1: 0.01, 2: 0.02, 4: 0.06}, [2, 1]), ({}, [3])])
def test_a_batch_is_split_where_empty_rows_cost_more_than_a_second_one(seconds, batches):
    class Timed(FakeEngine):
        def compute(self, prepared):
            count = len(prepared[1])
            time.sleep(seconds.get(next(s for s in self.batch_sizes if s >= count), 0.02))
            return super().compute(prepared)

    async def work(batcher, engine):
        for texts in ("a", "bc", "defg", "hij"):
            await asyncio.gather(*(batcher.answer(asked(t), 10) for t in texts))

    _, engine, _ = run(work, Timed(), max_delay=0.1)
    assert list(map(len, engine.batches)) == [1, 2, 4, *batches]


def test_one_slow_batch_does_not_rule_its_program_out():
    class Slow(FakeEngine):
        def compute(self, prepared):
            first_of_four = len(prepared[1]) == 4 and not any(len(b) == 4 for b in self.batches)
            time.sleep(0.2 if first_of_four else 0.02)
            return super().compute(prepared)

    async def work(batcher, engine):
        for texts in ("a", "bc", "defg", *["hij"] * 60):
            await asyncio.gather(*(batcher.answer(asked(t), 10) for t in texts))

    _, engine, _ = run(work, Slow(), max_delay=0.02)
    sizes = list(map(len, engine.batches))
    assert sizes[3:5] == [2, 1] and sizes[-1] == 3


def test_only_questions_with_one_key_share_a_batch():
    async def work(batcher, engine):
        questions = [asked("a"), asked("b", num_kept=1), asked("c")]
        return await asyncio.gather(*(batcher.answer(q, 10) for q in questions))

    answers, engine, _ = run(work)
    assert [answer["answer"] for answer in answers] == ["A", "B", "C"]
    assert sorted(map(sorted, engine.batches)) == [["a", "c"], ["b"]]


def test_an_invalid_question_does_not_fail_its_batch():
    async def work(batcher, engine):
        texts = ("a", "withdrawn", "b")
        return await asyncio.gather(
            *(batcher.answer(asked(t), 10) for t in texts), return_exceptions=True
        )

    (first, fault, last), _, _ = run(work)
    assert first["answer"] == "A" and last["answer"] == "B"
    assert isinstance(fault, RequestError) and fault.status == 422 and "7" in str(fault)


@pytest.mark.parametrize("cause", ["bug", "damaged"])
def test_a_fault_of_the_server_fails_its_batch_and_not_the_next(cause):
    async def work(batcher, engine):
        beside = asked("b" if cause == "damaged" else cause)
        caught, other = await asyncio.gather(
            *(batcher.answer(q, 10) for q in (asked(cause), beside)), return_exceptions=True
        )
        assert (other["answer"] == "B") if cause == "damaged" else other.status == 500
        assert caught.status == 500
        return await batcher.answer(asked("a"), 10)

    answer, _, _ = run(work)
    assert answer["answer"] == "A"


def test_late_and_cancelled_questions_free_their_places():
    async def work(batcher, engine):
        engine.gate.clear()
        first = asyncio.ensure_future(batcher.answer(asked("a"), 10))
        await asyncio.sleep(0.3)  # it is being computed
        second = asyncio.ensure_future(batcher.answer(asked("b"), 10))
        await asyncio.sleep(0.3)  # it is prepared, and waits for the first
        with pytest.raises(RequestError) as caught:
            await batcher.answer(asked("late"), 0.2)
        assert caught.value.status == 504
        gone = asyncio.ensure_future(batcher.answer(asked("gone"), 10))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        engine.gate.set()
        return await asyncio.gather(first, second)

    _, engine, _ = run(work, max_delay=0.01)
    assert engine.batches == [["a"], ["b"]]


def test_a_full_queue_rejects_with_the_seconds_to_wait():
    async def work(batcher, engine):
        engine.gate.clear()
        waiting = [asyncio.ensure_future(batcher.answer(asked(str(n)), 10)) for n in range(12)]
        await asyncio.sleep(0.3)
        with pytest.raises(RequestError) as caught:
            batcher.check_room(3)
        engine.gate.set()
        await asyncio.gather(*waiting)
        batcher.check_room(3)
        return caught.value

    error, _, _ = run(work, max_delay=0.01, max_queue=5)
    assert error.status == 429 and error.retry_after >= 1 and "5" in str(error)
