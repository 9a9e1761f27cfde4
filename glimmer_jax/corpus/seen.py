"""A set of numbers in little memory: ids of a corpus of any size, to find those given twice."""

from array import array

_FIRST_BITS = 10
_FULL = 0.75
# 2**64 over the golden ratio: the high bits of its multiples are spread evenly, whatever ids are counted
# up by.
_SPREAD = 0x9E3779B97F4A7C15


class Seen:
    """Numbers from 0 to 2**63 - 1, in 11 to 21 bytes each where Python's own set takes 60 or more."""

    def __init__(self) -> None:
        self._bits = _FIRST_BITS
        self._table = array("q", [-1]) * 2**self._bits
        self._count = 0

    def add(self, number: int) -> bool:
        """Whether the number was new."""
        place = self._place(number)
        if self._table[place] == number:
            return False
        self._table[place] = number
        self._count += 1
        if self._count > _FULL * len(self._table):
            self._bits += 1
            old, self._table = self._table, array("q", [-1]) * 2**self._bits
            for one in old:
                if one >= 0:
                    self._table[self._place(one)] = one
        return True

    def _place(self, number: int) -> int:
        table = self._table
        place = (number * _SPREAD & 0xFFFFFFFFFFFFFFFF) >> (64 - self._bits)
        while table[place] not in (-1, number):
            place = (place + 1) % len(table)
        return place
