"""The manifest of a passages folder: written last, checked before any other file is opened.

format_version             of this format
num_passages, num_tokens   lengths of the arrays
num_truncated              passages cut at max_length
num_unknown                tokens that the vocabulary cannot spell
num_pages                  passages with a `page`
num_string_ids             passages whose external id is a string
max_length                 most tokens of a passage, end token included
vocabulary_fingerprint, vocab_size, eos_id, source
files                      {name: {"bytes", "sha256", "blocks"}}, see `checked_file`
checksum                   SHA-256 of all of the above
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.checked_file import DIGEST_BYTES, npy_bytes, num_blocks
from glimmer_jax.storage.json_lines import parse_line

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
FILES = ("tokens.npy", "offsets.npy", "ids.npy", "passages.jsonl", "text_offsets.npy")
_MAX_BYTES = 2**28
_REMEDY = "Delete the folder and copy it again, or rerun --run_mode=passages."
# Rows are int32, and so are token ids.
_RANGES = {
    "num_passages": (1, 2**31 - 2),
    "num_tokens": (1, 2**62),
    "num_truncated": (0, 2**31),
    "num_unknown": (0, 2**62),
    "num_pages": (0, 2**31),
    "num_string_ids": (0, 2**31),
    "max_length": (2, 2**31),
    "vocab_size": (1, 2**31),
    "eos_id": (0, 2**31),
}


def token_dtype(vocab_size: int) -> np.dtype:
    """Up to 65,536 token ids take two bytes each."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<i4")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the checksum and writes the manifest; returns it."""
    complete = {**manifest, "checksum": _checksum(manifest)}
    (folder / MANIFEST).write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    return complete


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, and the sizes of its files, checked against each other.

    Raises ValueError where the folder is missing, unfinished, of another format, or damaged.
    """
    where = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(
            f"PASSAGES_DIR: no folder {folder}. Write one with --run_mode=passages, or check the path."
        )
    if not where.is_file():
        raise ValueError(
            f"PASSAGES_DIR: {folder} has no {MANIFEST}, so it is not a complete passages folder. Write "
            "one with --run_mode=passages."
        )
    if (size := where.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{where} has {size} bytes, more than {_MAX_BYTES}. {_REMEDY}")
    manifest = parse_line(where.read_bytes(), str(where))
    version = manifest.get("format_version")
    if "shards" in manifest:
        raise ValueError(
            f"PASSAGES_DIR: {folder} is a memory or an index. Set PASSAGES_DIR to the folder written by "
            "--run_mode=passages."
        )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"PASSAGES_DIR: {folder} has format version {version!r:.20}, this release reads "
            f"{FORMAT_VERSION}. Rerun --run_mode=passages."
        )
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise ValueError(f"{where} is damaged: its checksum differs. {_REMEDY}")
    _check_values(where, manifest)
    _check_sizes(folder, manifest)
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(manifest, sort_keys=True)
    except RecursionError:
        raise ValueError(f"{MANIFEST} is nested too deeply. {_REMEDY}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def _check_values(where: Path, manifest: Mapping[str, Any]) -> None:
    for name, (low, high) in _RANGES.items():
        value = manifest.get(name)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"{where}: `{name}` must be an integer from {low} to {high}, got {value!r:.40}. "
                f"{_REMEDY}"
            )
    if not isinstance(manifest.get("vocabulary_fingerprint"), str):
        raise ValueError(f"{where}: `vocabulary_fingerprint` must be a string. {_REMEDY}")
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise ValueError(f"{where}: `files` must describe {', '.join(FILES)}. {_REMEDY}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not _is_entry(entry):
            raise ValueError(f"{where}: the entry of {name} is malformed. {_REMEDY}")


def _is_entry(entry: Mapping[str, Any]) -> bool:
    size, sha256, blocks = (entry.get(name) for name in ("bytes", "sha256", "blocks"))
    if type(size) is not int or not 0 < size < 2**62:
        return False
    digits = 2 * DIGEST_BYTES * num_blocks(size)
    return all(
        isinstance(text, str) and len(text) == length and re.fullmatch("[0-9a-f]*", text)
        for text, length in ((sha256, 64), (blocks, digits))
    )


def _check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    passages, int64 = manifest["num_passages"], np.dtype("<i8")
    tokens = npy_bytes(token_dtype(manifest["vocab_size"]), manifest["num_tokens"])
    expected = {
        "tokens.npy": tokens,
        "ids.npy": npy_bytes(int64, passages),
        "offsets.npy": npy_bytes(int64, passages + 1),
        "text_offsets.npy": npy_bytes(int64, passages + 1),
    }
    for name in FILES:
        size = expected.get(name, manifest["files"][name]["bytes"])
        if manifest["files"][name]["bytes"] != size:
            raise ValueError(
                f"{folder / MANIFEST}: {passages} passages need {size} bytes of {name}, not "
                f"{manifest['files'][name]['bytes']}. {_REMEDY}"
            )
        path = folder / name
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no regular file"
        if found != f"{size} bytes":
            raise ValueError(f"{path}: expected {size} bytes, found {found}. {_REMEDY}")
