"""Passage ids: the user's own outside, 63-bit numbers inside.

An external id is an integer from 0 to 2**63 - 1 or a non-empty string. Files, predictions and messages
carry it unchanged. Arrays carry its number: an integer is its own number, the decimal digits of an
integer have that integer's number (`7` and `"7"` are one id, as in KILT), and any other string has a
hash. The writer of a passages folder rejects two ids with one number, so a number names one passage.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

MAX_ID = 2**63 - 1
# Of 1,000 hashes one is smaller. Integers that people give as ids are.
_SMALLEST_HASH = 2**53
# Neither "007" nor "٧" is how an integer is written.
_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}")


def stable_hash(*parts: object) -> int:
    """A 63-bit number that depends on the parts alone, not on the process."""
    data = "\x00".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def id_number(external: Any) -> int:
    """The number of an external id. Raises ValueError for anything that is no id."""
    if isinstance(external, bool) or not isinstance(external, (int, str)) or external == "":
        raise ValueError(f"`id` must be an integer or a non-empty string, got {external!r:.80}.")
    if isinstance(external, str):
        if _INTEGER.fullmatch(external) and int(external) <= MAX_ID:
            return int(external)
        return stable_hash("id", external)
    if not 0 <= external <= MAX_ID:
        raise ValueError(f"`id` must be from 0 to 2**63 - 1, got {str(external)[:80]}.")
    return external


def is_hash(number: int) -> bool:
    """Whether a number is, very probably, the hash of a string id, which it does not give back."""
    return number >= _SMALLEST_HASH


def describe_numbers(numbers: Iterable[int], limit: int = 5) -> str:
    """Numbers for a message where the external ids are not at hand: `3, 7, … and 2 string ids`."""
    numbers = [int(number) for number in numbers]
    known = [str(number) for number in numbers if not is_hash(number)]
    strings = len(numbers) - len(known)
    shown = ", ".join(known[:limit]) + (", …" if len(known) > limit else "")
    parts = [shown] if known else []
    if strings:
        parts.append(f"{strings} string id{'s' if strings > 1 else ''}")
    return " and ".join(parts)
