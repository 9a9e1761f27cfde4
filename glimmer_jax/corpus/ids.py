"""Passage ids: the user's own outside, 63-bit numbers inside.

An external id is an integer from 0 to 2**63 - 1 or a non-empty string. Files, predictions and messages
carry it unchanged. Arrays carry its number: an integer is its own number, the decimal digits of an
integer have that integer's number (`7` and `"7"` are one id, as in KILT), and any other string has a
hash. The writer of a passages folder rejects two ids with one number, so a number names one passage.
"""

import hashlib
import re
from typing import Any

MAX_ID = 2**63 - 1
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
