"""Which corpus a retrieved file names passages of: ids mean nothing in another one.

    nq-dev.jsonl    nq-dev.passages.json    {"corpus_sha256": "…", "passages_dir": "data/passages"}

Retrieval writes the note, and what reads passages for the file compares it. The sum is of ids, titles and
texts, so the corpus may be tokenised again. A file without a note is taken as it is.
"""

import json
import os
from pathlib import Path
from typing import Any

import tensorstore as ts

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.storage.folder import (
    in_bucket,
    list_files,
    of_file,
    open_folder,
    read_file,
    write_file,
)
from glimmer_jax.storage.json_lines import parse_line

_SUFFIX = ".passages.json"


def note(path: Any, passages: Passages) -> None:
    """Notes that a retrieved file, local or in a bucket, names these passages; whole or not at all."""
    found = {"corpus_sha256": _corpus(passages), "passages_dir": passages.place}
    text = json.dumps(found, indent=2) + "\n"
    place, file = of_file(path)
    write_file(place, _name(file), text.encode())


def check(path: Any, passages: Passages) -> None:
    """Compares a retrieved file, or all those of a folder, local or not, with the passages at hand.

    Raises ValueError where one was retrieved from another corpus.
    """
    place, notes = _notes(path)
    for one in notes:
        data = read_file(place, one)
        if data is None:
            continue
        found = parse_line(data, f"{place.url}{one}")
        if found.get("corpus_sha256") != _corpus(passages):
            raise ValueError(
                f"{place.url}{one.removesuffix(_SUFFIX)}.jsonl was retrieved from "
                f"{found.get('passages_dir')}, and {passages.place} holds another corpus. Give the "
                "passages it was retrieved from, or retrieve again."
            )


def _notes(path: Any) -> tuple[ts.KvStore, list[str]]:
    """Where the notes of a folder, or that of a file, lie, and their names."""
    text = os.fspath(path).rstrip("/")
    place = open_folder(text)
    if in_bucket(text):
        names = [key for key in list_files(place, "") if "/" not in key]
    else:
        names = sorted(found.name for found in Path(text).glob(f"*{_SUFFIX}"))
    if notes := [name for name in names if name.endswith(_SUFFIX)]:
        return place, notes
    place, file = of_file(text)
    return place, [_name(file)]


def _name(file: str) -> str:
    """Of the note beside a retrieved file."""
    return os.path.splitext(file)[0] + _SUFFIX


def _corpus(passages: Passages) -> str:
    return str(passages.manifest["files"]["passages.jsonl"]["sha256"])
