"""Notes beside retrieved files: which corpus their passage ids belong to, and which request made them.

    nq-dev.jsonl
    nq-dev.passages.json    {"corpus_sha256": "…", "passages_dir": "data/passages", "request_sha256": "…",
                             "bytes": 81723, "file_sha256": "…"}

Retrieval writes the note just before the file appears at its place. Modes that read passages
for the file compare the corpus, and those that answer its questions or train on them compare its bytes.
The hash of the corpus covers ids, titles and texts, so it may be tokenised again. The request is
everything that determines the file, so that a rerun can keep files that are complete. A file without a
note is accepted.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.storage.folder import (
    in_bucket,
    list_files,
    local_path,
    of_file,
    open_folder,
    read_file,
    write_file,
)
from glimmer_jax.storage.json_lines import parse_line

_SUFFIX = ".passages.json"


def write_note(path: Any, content: Path, passages: Passages, request: Mapping[str, Any]) -> None:
    """Writes the note of a retrieved file, local or in a bucket, atomically.

    Args:
      path: of the file.
      content: the file, or its temporary copy.
      passages: the corpus it was retrieved from.
      request: everything that determines it.
    """
    note: dict[str, Any] = {
        "corpus_sha256": passages.corpus_sha256,
        "passages_dir": passages.place,
        "request_sha256": _digest(request),
    }
    folder, file = of_file(path)
    note |= _content(content)
    write_file(folder, _note_name(file), (json.dumps(note, indent=2) + "\n").encode())


def answers_request(path: Any, request: Mapping[str, Any]) -> bool:
    """Whether a retrieved file is that of its note, and the note has this request."""
    note = _note(path)
    if note.get("request_sha256") != _digest(request):
        return False
    # Notes of earlier versions have no checksum.
    found, wanted = _content(path), note.get("file_sha256")
    return bool(found) and wanted in (None, found["file_sha256"])


def check(path: Any, passages: Passages) -> None:
    """Compares a retrieved file, or all those of a folder, local or not, with the passages folder.

    Raises ValueError where one was retrieved from another corpus.
    """
    folder, names = _notes(path)
    for name in names:
        data = read_file(folder, name)
        if data is None:
            continue
        note = parse_line(data, f"{folder.url}{name}")
        if note.get("corpus_sha256") != passages.corpus_sha256:
            raise ValueError(
                f"{folder.url}{name.removesuffix(_SUFFIX)}.jsonl was retrieved from "
                f"{note.get('passages_dir')}, and {passages.place} holds another corpus. Set "
                "PASSAGES_DIR to the former, or rerun --run_mode=retrieve."
            )


def file_sha256(path: Any) -> str | None:
    """The checksum of a retrieved file, local or in a bucket, according to its note.

    Returns:
      None if it has none, or was compressed afterwards.

    Raises:
      ValueError: the note is damaged.
      StorageError: the storage did not answer, or denied access.
    """
    wanted = None if os.fspath(path).endswith(".gz") else _note(path).get("file_sha256")
    return None if wanted is None else str(wanted)


def check_content(path: Any, content: Path, wanted: str | None) -> None:
    """Raises ValueError if a file is not the one that its note describes.

    Args:
      path: of the file, for the message.
      content: the file, or its local copy.
      wanted: from `file_sha256`; None is not compared.
    """
    if wanted is not None and _content(content).get("file_sha256") != wanted:
        raise ValueError(
            f"{path} is not the file that --run_mode=retrieve wrote: its SHA-256 differs. Copy it again "
            "or rerun that mode; if it was changed on purpose, remove "
            f"{_note_name(of_file(path)[1])} beside it."
        )


def _notes(path: Any) -> tuple[ts.KvStore, list[str]]:
    """The folder and the names of the notes of a folder or a file."""
    text = os.fspath(path).rstrip("/")
    folder = open_folder(text)
    if in_bucket(text):
        names = [key for key in list_files(folder, "") if "/" not in key]
    else:
        names = sorted(file.name for file in Path(text).glob(f"*{_SUFFIX}"))
    if notes := [name for name in names if name.endswith(_SUFFIX)]:
        return folder, notes
    folder, file = of_file(text)
    return folder, [_note_name(file)]


def _note(path: Any) -> dict[str, Any]:
    """The note of a file; empty if it has none."""
    folder, file = of_file(path)
    data = read_file(folder, _note_name(file))
    return {} if data is None else parse_line(data, f"{folder.url}{_note_name(file)}")


def _note_name(file: str) -> str:
    return os.path.splitext(file.removesuffix(".gz"))[0] + _SUFFIX


def _content(path: Any) -> dict[str, Any]:
    """Size and checksum of a file; empty if there is none."""
    path = local_path(path)
    if in_bucket(path):
        data = read_file(*of_file(path))
        if data is None:
            return {}
        return {"bytes": len(data), "file_sha256": hashlib.sha256(data).hexdigest()}
    if not os.path.isfile(path):
        return {}
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "file_sha256": digest}


def _digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
