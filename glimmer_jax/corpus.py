"""Corpus files: JSON Lines of `{"id", "title", "text", …}`, one passage a line.

`id` is the external id that examples, memory and passages share; further fields (page, chunk, split)
are carried along.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glimmer_jax.json_lines import read_json_lines

MAX_ID = 2**63 - 1


def read_corpus(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records `{"id", "title", "text", …}` of a JSON Lines corpus file.

    Raises ValueError naming file and line for bad JSON, for an id that is no integer from 0 to
    2**63 - 1, and for a title or text that is not a string.
    """
    for number, record in read_json_lines(path):
        where = f"{path}:{number}"
        identifier = record.get("id")
        if not isinstance(identifier, int) or isinstance(identifier, bool):
            raise ValueError(
                f"{where}: wanted an integer `id`, got {identifier!r}. Number the passages."
            )
        if not 0 <= identifier <= MAX_ID:
            raise ValueError(f"{where}: `id` must be from 0 to 2**63 - 1, got {identifier}.")
        for field in ("title", "text"):
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"{where}: wanted a string `{field}`, got {record.get(field)!r}. Every passage "
                    "has a title and a text; either may be empty."
                )
        yield record
