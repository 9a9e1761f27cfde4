"""Reading ahead: work on a thread while the consumer works, and a count of the waiting that remains."""

import contextlib
import itertools
import threading

import pytest

from glimmer_jax.runtime import prefetch as module
from glimmer_jax.runtime.prefetch import ReadAhead, prefetch


def test_the_next_item_is_computed_while_the_caller_works_on_this_one():
    begun = [threading.Event() for _ in range(4)]

    def read(number):
        begun[number].set()
        return {"number": number}

    for number, batch in enumerate(ReadAhead(read)(range(4))):
        assert batch == {"number": number}
        # The caller works and does not request the next item.
        assert begun[min(number + 1, 3)].wait(60)


def test_all_but_the_first_item_of_each_stream_count_as_waiting(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    ahead = ReadAhead(lambda number: {"number": number})
    assert len(list(ahead(range(5)))) == 5 and ahead.waited == 4
    assert len(list(ahead(range(1)))) == 1 and ahead.waited == 4
    assert list(ahead([])) == []


def test_an_error_is_raised_in_place_of_its_item():
    def read(number):
        if number == 1:
            raise ValueError("one")
        return {"number": number}

    stream = ReadAhead(read)(range(3))
    assert next(stream) == {"number": 0}
    with pytest.raises(ValueError, match="one"):
        next(stream)


def test_a_source_is_drawn_on_the_thread_and_its_end_is_the_end():
    drawn_on = set()

    def source():
        for number in range(3):
            drawn_on.add(threading.current_thread())
            yield number

    assert list(prefetch(source(), lambda number: number + 1)) == [1, 2, 3]
    assert threading.current_thread() not in drawn_on


def test_an_error_in_the_source_is_raised_in_place_of_its_item():
    def broken():
        yield 0
        raise ValueError("line 7 is not JSON")

    stream = prefetch(broken(), str)
    assert next(stream) == "0"
    with pytest.raises(ValueError, match="line 7"):
        next(stream)


def test_closing_ends_the_thread():
    with contextlib.closing(prefetch(itertools.count(), str)) as stream:
        assert next(stream) == "0"
    assert not [one for one in threading.enumerate() if one.name.startswith("read-ahead")]
