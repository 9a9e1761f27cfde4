"""What a passage is, `{"id", "title", "text", …}`, and ids that are the same everywhere.

`id` is the external id that examples, memory and passages share. Further fields are carried along:
`page`, the `wikipedia_id` of KILT's provenance; `paragraphs`, the first and the last one of the page that
a passage is from; `chunk`, where a passage is one paragraph; `split`.
"""

import hashlib
from typing import Any

MAX_ID = 2**63 - 1


def stable_hash(*parts: object) -> int:
    """A 63-bit number that depends on the parts alone, not on the process."""
    data = "\x00".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def check_record(record: dict[str, Any]) -> None:
    """Raises ValueError for an id that is no integer from 0 to `MAX_ID`, and for no title or text."""
    identifier = record.get("id")
    if not isinstance(identifier, int) or isinstance(identifier, bool):
        raise ValueError(
            f"wanted an integer `id`, got {identifier!r:.80}. Number the passages, or set "
            "CORPUS_FORMAT to what the file is."
        )
    if not 0 <= identifier <= MAX_ID:
        raise ValueError(f"`id` must be from 0 to 2**63 - 1, got {identifier}.")
    for field in ("title", "text"):
        if not isinstance(record.get(field), str):
            raise ValueError(
                f"wanted a string `{field}`, got {record.get(field)!r:.80}. Every passage has a title "
                "and a text."
            )
