"""Dynamic batching: questions that arrive together are answered together.

Two threads form a pipeline. The first waits for questions, forms a batch of those that may share
one program, and prepares it (retrieval, memory); the second computes it. So the memory of the next
batch is read while one is computed. Requests wait on asyncio futures; a request that is cancelled
or late gives its place up.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from glimmer_jax.server.protocol import Question, RequestError
from glimmer_jax.storage.errors import DamagedData

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Answers batches; the calls of `prepare` and of `compute` each come from one thread."""

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Sizes of the compiled programs, ascending; a batch in between costs as much as the next."""
        ...

    def key(self, question: Question) -> Hashable:
        """Questions with equal keys may share a batch."""
        ...

    def prepare(self, questions: Sequence[Question]) -> Any:
        """Retrieves passages and reads their memory. Raises ValueError for an invalid question."""
        ...

    def compute(self, prepared: Any) -> list[dict[str, Any]]:
        """An answer per question, in order, with `timings` in seconds per stage."""
        ...


class Observer(Protocol):
    """Receives counts of queue and batches."""

    def queued(self, length: int) -> None: ...

    def computed(self, size: int, seconds: float) -> None: ...


@dataclasses.dataclass(eq=False)
class _Item:
    question: Question
    key: Hashable
    future: asyncio.Future
    arrived: float
    deadline: float
    started: float = 0.0


class Batcher:
    """Answers questions with an engine; a context that owns the two threads.

    Args:
      engine: answers batches.
      max_delay: seconds that the first question of a batch waits for as many others as the batch
        before it had, so that a lone client never waits.
      max_queue: questions that may wait; further ones are rejected with 429.
      observer: is told about queue and batches.
    """

    def __init__(self, engine: Engine, max_delay: float, max_queue: int, observer: Observer):
        self._engine = engine
        self._max_delay = max_delay
        self._max_queue = max_queue
        self._observer = observer
        self._waiting: collections.deque[_Item] = collections.deque()
        self._changed = threading.Condition()
        self._handoff: queue.Queue[list[tuple[list[_Item], Any]] | None] = queue.Queue()
        # One batch is computed, and one is prepared beside it. While both are, questions wait in
        # the queue, where the next batch fills up.
        self._places = threading.Semaphore(1)
        self._closed = False
        self._expected = engine.batch_sizes[-1]  # questions of the next batch
        self._rate: float | None = None  # questions per second, smoothed
        self._seconds: dict[tuple[Hashable, int], float] = {}  # of a program, smoothed
        self._threads = [
            threading.Thread(target=self._prepare_batches, name="prepare", daemon=True),
            threading.Thread(target=self._compute_batches, name="compute", daemon=True),
        ]

    def __enter__(self) -> "Batcher":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def check_room(self, count: int) -> None:
        """Raises RequestError (429, with seconds to wait) where `count` more questions do not fit.

        A request that never fits gets a 422.
        """
        if count > self._max_queue:
            raise RequestError(
                422, f"A request may have at most {self._max_queue} questions, got {count}."
            )
        with self._changed:
            waiting = len(self._waiting)
        if waiting + count > self._max_queue:
            seconds = max(1, math.ceil(waiting / self._rate)) if self._rate else 1
            raise RequestError(
                429,
                f"The queue holds {waiting} of at most {self._max_queue} questions and has no room "
                f"for {count} more. Retry later.",
                retry_after=min(seconds, 60),
            )

    async def answer(self, question: Question, timeout: float) -> dict[str, Any]:
        """The engine's answer, with the seconds spent waiting as `timings["queue"]`.

        Raises:
          RequestError: 422 for an invalid question, 504 after `timeout` seconds.
        """
        now = time.monotonic()
        future: asyncio.Future = asyncio.get_running_loop().create_future()
        item = _Item(question, self._engine.key(question), future, now, now + timeout)
        with self._changed:
            self._waiting.append(item)
            self._observer.queued(len(self._waiting))
        # The other questions of a request come before the batch is formed.
        asyncio.get_running_loop().call_soon(self._wake)
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise RequestError(504, f"No answer within {timeout:g} s.") from None
        finally:
            self._forget(item)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _forget(self, item: _Item) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(item)
            self._observer.queued(len(self._waiting))

    def _prepare_batches(self) -> None:
        try:
            while True:
                self._places.acquire()
                items = self._next_batch()
                if not items:
                    return
                self._handoff.put(list(self._prepared(items)))
        finally:
            self._handoff.put(None)

    def _next_batch(self) -> list[_Item]:
        """Waits for questions; none once the batcher is closed and nothing waits."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            first = self._waiting[0]
            while sum(item.key == first.key for item in self._waiting) < self._expected:
                left = first.arrived + self._max_delay - time.monotonic()
                if left <= 0 or self._closed:
                    break
                self._changed.wait(left)
            batch = [item for item in self._waiting if item.key == first.key]
            batch = batch[: self._size(first.key, len(batch))]
            for item in batch:
                self._waiting.remove(item)
            self._observer.queued(len(self._waiting))
            self._expected = max(1, len(batch))
            # The first may have given its place up meanwhile; then the next call takes the rest.
            return batch or [first]

    def _size(self, key: Hashable, waiting: int) -> int:
        """How many of the questions that wait are answered next.

        All that fit, unless a smaller program and one for the rest take less time than the larger one
        with empty rows: where the time of a batch grows with its size, as on a CPU.
        """
        sizes = self._engine.batch_sizes
        below = [size for size in sizes if size <= waiting]
        if not below or below[-1] in (waiting, sizes[-1]):
            return min(waiting, sizes[-1])
        programs = [below[-1], _program(sizes, waiting - below[-1]), _program(sizes, waiting)]
        seconds = [self._seconds.get((key, size)) for size in programs]
        if None in seconds:
            return waiting
        first, rest, all_at_once = (value or 0.0 for value in seconds)
        if first + rest >= all_at_once:
            return waiting
        # A program that is not used is not measured: one slow run must not rule it out for ever.
        self._seconds[key, programs[-1]] = 0.95 * all_at_once
        return below[-1]

    def _prepared(self, items: list[_Item]) -> Iterator[tuple[list[_Item], Any]]:
        now = time.monotonic()
        live = [item for item in items if not item.future.done() and item.deadline > now]
        for item in live:
            item.started = now
        if not live:
            return
        try:
            prepared = self._engine.prepare([item.question for item in live])
        except ValueError as error:
            if len(live) == 1 and isinstance(error, DamagedData):
                self._fail(live, error)  # the server's fault, not the question's
                return
            if len(live) == 1:
                _finish(live[0], error=RequestError(422, str(error)))
                return
            # An invalid question must not fail those that share its batch.
            for item in live:
                yield from self._prepared([item])
        except Exception as error:  # noqa: BLE001 - the thread outlives a bug; its requests get a 500
            self._fail(live, error)
        else:
            yield live, prepared

    def _compute_batches(self) -> None:
        while (batches := self._handoff.get()) is not None:
            self._places.release()
            # More than one if an invalid question split the batch.
            for items, prepared in batches:
                if not all(item.future.done() for item in items):
                    self._compute(items, prepared)

    def _compute(self, items: list[_Item], prepared: Any) -> None:
        begun = time.monotonic()
        try:
            answers = self._engine.compute(prepared)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(items, error)
            return
        seconds = time.monotonic() - begun
        self._rate = _smoothed(self._rate, len(items) / max(seconds, 1e-6))
        program = items[0].key, _program(self._engine.batch_sizes, len(items))
        self._seconds[program] = _smoothed(self._seconds.get(program), seconds)
        self._observer.computed(len(items), seconds)
        for item, answer in zip(items, answers, strict=True):
            timings = {"queue": item.started - item.arrived, **answer["timings"]}
            _finish(item, answer={**answer, "timings": timings})

    @staticmethod
    def _fail(items: list[_Item], error: Exception) -> None:
        logger.error("A batch of %d questions failed.", len(items), exc_info=error)
        for item in items:
            _finish(item, error=RequestError(500, "Internal error; the server's log has details."))


def _program(sizes: Sequence[int], questions: int) -> int:
    return next(size for size in sizes if size >= questions)


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else 0.8 * before + 0.2 * value


def _finish(item: _Item, answer: Any = None, error: Exception | None = None) -> None:
    def set_result() -> None:
        if item.future.done():
            return
        if error is not None:
            item.future.set_exception(error)
        else:
            item.future.set_result(answer)

    # The loop may be closed by now, and with it whoever waited.
    with contextlib.suppress(RuntimeError):
        item.future.get_loop().call_soon_threadsafe(set_result)
