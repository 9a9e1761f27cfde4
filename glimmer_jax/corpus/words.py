"""Paragraphs to passages of a bounded number of words.

Each passage costs memory and retrieval, so a passage is filled before the next one begins. It ends after
the last sentence or paragraph that ends in its second half, or after its last word where none does.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Without it, text written without spaces would be one word.
MAX_WORD = 256
_CLOSING = "\"')]”’»"
_ENDS = (".", "!", "?", "。", "！", "？")


class Piece(NamedTuple):
    """Text of a passage, and the numbers of its first and last paragraph."""

    first: int
    last: int
    text: str


def split_words(text: str) -> list[str]:
    """Words between white space; words longer than `MAX_WORD` characters are split."""
    words = text.split()
    if not words or max(map(len, words)) <= MAX_WORD:
        return words
    return [
        word[start : start + MAX_WORD] for word in words for start in range(0, len(word), MAX_WORD)
    ]


def pieces(paragraphs: Iterable[tuple[int, str]], limit: int, heading: str = "") -> Iterator[Piece]:
    """Passages of at most `limit` words, each beginning with `heading`.

        pieces([(1, "One two. Three"), (2, "four")], 3, "A")
            -> (1, 1, "A One two."), (1, 2, "A Three four")

    Args:
      paragraphs: (number, text); runs of white space become one space.
      limit: most words of a passage, at least 2, with those of the heading; a long heading is truncated
        at half of `limit`.
      heading: of the section that the paragraphs form.
    """
    head = split_words(heading)[: limit // 2]
    room = limit - len(head)
    ids, ends, words = [], [], []
    for number, text in paragraphs:
        if paragraph := split_words(text):
            words += paragraph
            ids.append(number)
            ends.append(len(words))
    start = 0
    while start < len(words):
        stop = _stop(words, ends, start, room)
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, stop)
        yield Piece(ids[first], ids[last], " ".join(itertools.chain(head, words[start:stop])))
        start = stop


def _stop(words: list[str], ends: list[int], start: int, room: int) -> int:
    full = start + room
    if full >= len(words):
        return len(words)
    for stop in range(full, start + room // 2, -1):
        if words[stop - 1].rstrip(_CLOSING).endswith(_ENDS):
            return stop
        if ends[bisect.bisect_left(ends, stop)] == stop:
            return stop
    return full
