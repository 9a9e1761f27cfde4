"""Which corpus a retrieved file names passages of: ids mean nothing in another one.

    nq-dev.jsonl    nq-dev.passages.json    {"corpus_sha256": "…", "passages_dir": "data/passages"}

Retrieval writes the note, and what reads passages for the file compares it. The sum is of ids, titles and
texts, so the corpus may be tokenised again. A file without a note is taken as it is.
"""

import json
from pathlib import Path
from typing import Any

from etils import epath

from glimmer_jax.json_lines import parse_line
from glimmer_jax.passages import Passages

_SUFFIX = ".passages.json"


def note(path: Any, passages: Passages) -> None:
    """Notes that a retrieved file, local or in a bucket, names these passages."""
    found = {"corpus_sha256": _corpus(passages), "passages_dir": str(passages.path)}
    text = json.dumps(found, indent=2) + "\n"
    epath.Path(path).with_suffix(_SUFFIX).write_text(text)


def check(path: str | Path, passages: Passages) -> None:
    """Compares a retrieved file, or all those of a folder, with the passages at hand.

    Raises ValueError where one was retrieved from another corpus.
    """
    path = Path(path)
    notes = sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path.with_suffix(_SUFFIX)]
    for one in notes:
        if not one.is_file():
            continue
        found = parse_line(one.read_bytes(), str(one))
        if found.get("corpus_sha256") != _corpus(passages):
            raise ValueError(
                f"{one.name.removesuffix(_SUFFIX)}.jsonl of {one.parent} was retrieved from "
                f"{found.get('passages_dir')}, and {passages.path} holds another corpus. Give the "
                "passages it was retrieved from, or retrieve again."
            )


def _corpus(passages: Passages) -> str:
    return str(passages.manifest["files"]["passages.jsonl"]["sha256"])
