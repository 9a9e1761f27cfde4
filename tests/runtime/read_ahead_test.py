"""Reading ahead: hidden behind the model's work, and what is not hidden is counted."""

import itertools
import threading

import pytest

from glimmer_jax.runtime import prefetch
from glimmer_jax.runtime.prefetch import ReadAhead


def test_the_next_batch_is_read_while_the_caller_works_on_this_one():
    begun = [threading.Event() for _ in range(4)]

    def read(number):
        begun[number].set()
        return {"number": number}

    for number, batch in enumerate(ReadAhead(read)(range(4))):
        assert batch == {"number": number}
        # The caller's work: it does not ask for the next one.
        assert begun[min(number + 1, 3)].wait(60)


def test_all_but_the_first_of_each_stream_counts_as_waiting(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: float(next(ticks)))
    ahead = ReadAhead(lambda number: {"number": number})
    assert len(list(ahead(range(5)))) == 5 and ahead.waited == 4
    assert len(list(ahead(range(1)))) == 1 and ahead.waited == 4
    assert list(ahead([])) == []


def test_an_error_is_raised_in_its_place():
    def read(number):
        if number == 1:
            raise ValueError("one")
        return {"number": number}

    stream = ReadAhead(read)(range(3))
    assert next(stream) == {"number": 0}
    with pytest.raises(ValueError, match="one"):
        next(stream)
