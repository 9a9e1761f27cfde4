"""Work on a thread, one item ahead of the consumer."""

import concurrent.futures
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
_END: Any = object()


class ReadAhead(Generic[T, U]):
    """Maps a function over a stream, computing the next item on a thread while one is consumed.

    Attributes:
      waited: seconds that consumers have waited so far, except for the first item of each stream,
        which has nothing to hide behind.
    """

    def __init__(self, function: Callable[[T], U]):
        self._function = function
        self.waited = 0.0

    def __call__(self, items: Iterable[T]) -> Iterator[U]:
        """The results in order. An error is raised where its result would have come.

        The items are drawn on the consumer's thread. At most two results exist at a time.
        """
        with concurrent.futures.ThreadPoolExecutor(1, "read-ahead") as thread:
            previous: concurrent.futures.Future[U] | None = None
            first = True
            for item in items:
                following = thread.submit(self._function, item)
                if previous is not None:
                    yield self._take(previous, first)
                    first = False
                previous = following
            if previous is not None:
                yield self._take(previous, first)

    def _take(self, result: concurrent.futures.Future[U], first: bool) -> U:
        began = time.monotonic()
        item = result.result()
        if not first:
            self.waited += time.monotonic() - began
        return item


def prefetch(items: Iterable[T], function: Callable[[T], U]) -> Generator[U]:
    """`function` of each item, where drawing an item is work for the thread as well.

    Close the iterator (`contextlib.closing`) to end the thread early.
    """
    source = iter(items)

    def read(_: None) -> Any:
        item = next(source, _END)
        return _END if item is _END else function(item)

    for result in ReadAhead(read)(itertools.repeat(None)):
        if result is _END:
            return
        yield result
