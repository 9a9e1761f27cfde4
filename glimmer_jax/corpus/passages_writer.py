"""Writes a passages folder (`passages`): whole or not at all, on disk before it has its name."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.passages import (
    ASIDE,
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    claim,
    put_back,
    sha256,
)
from glimmer_jax.storage.folder import local
from glimmer_jax.storage.json_lines import dump_line
from glimmer_jax.vocabulary import passage_text

EOS_ID = 1
_NPY_HEADER = 128


def check_absent(path: str | Path, overwrite: bool) -> None:
    """Raises ValueError where a folder is there already and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise ValueError(
            f"{path} exists already. Remove it, write elsewhere, or allow it to be overwritten."
        )


def write_passages(
    path: str | Path,
    records: Iterable[Mapping[str, Any]],
    encode: Callable[[str], Sequence[int]],
    fingerprint: str,
    max_length: int,
    *,
    vocab_size: int,
    eos_id: int = EOS_ID,
    source: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a passages folder; returns its manifest.

    Args:
      path: folder to make.
      records: `{"id", "title", "text", …}`, in the order of the rows; further fields are kept.
      encode: text to token ids, without end token.
      fingerprint: of the vocabulary behind `encode`.
      max_length: most tokens a passage keeps, the end token included.
      vocab_size: above every token id; up to 65,536 tokens are stored in two bytes.
      eos_id: the end token.
      source: where the corpus comes from, for people.
      overwrite: whether a folder already there may be replaced.

    Raises:
      ValueError: the folder exists, an id is given twice, a token id does not fit `vocab_size`,
        there is no passage, or `max_length` is below 2.
    """
    target = local("PASSAGES_DIR", path)
    if max_length < 2:
        raise ValueError(f"max_length must be 2 or more, a token and the end, got {max_length}.")
    put_back(target)
    check_absent(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    working = target.parent / f".{target.name}.writing-{os.getpid()}"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    alive = claim(working)
    try:
        dtype = np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)
        counts = _write_arrays(working, records, encode, max_length, vocab_size, eos_id, dtype)
        manifest = {
            "format_version": FORMAT_VERSION,
            **counts,
            "max_length": max_length,
            "vocabulary_fingerprint": fingerprint,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "source": source,
            "files": {
                name: {"bytes": (working / name).stat().st_size, "sha256": sha256(working / name)}
                for name in FILES
            },
        }
        with (working / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
        # On disk before the folder has its name, or a power cut could leave the name without the bytes.
        for part in (*FILES, MANIFEST, "."):
            _sync(working / part)
        _move_into_place(working, target)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    finally:
        if alive is not None:
            os.close(alive)
    # Now that the new folder is in its place, what killed writers left is of no use.
    for left in target.parent.glob(f".{target.name}.writing-*"):
        if (held := claim(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    return manifest


def _write_arrays(
    folder: Path,
    records: Iterable[Mapping[str, Any]],
    encode: Callable[[str], Sequence[int]],
    max_length: int,
    vocab_size: int,
    eos_id: int,
    dtype: np.dtype,
) -> dict[str, int]:
    truncated = 0
    with contextlib.ExitStack() as stack:
        tokens_file = stack.enter_context(_Npy(folder / "tokens.npy", dtype))
        ids, offsets, text_offsets = (
            stack.enter_context(_Npy(folder / f"{name}.npy", np.dtype(np.int64)))
            for name in ("ids", "offsets", "text_offsets")
        )
        lines_file = stack.enter_context((folder / "passages.jsonl").open("wb"))
        num_bytes = 0
        offsets.append([0])
        text_offsets.append([0])
        for record in records:
            tokens = list(encode(passage_text(record["title"], record["text"])))
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise ValueError(
                    f"Passage {record['id']} has a token id outside 0..{vocab_size - 1}. Give "
                    "vocab_size of the vocabulary that encodes."
                )
            truncated += len(tokens) >= max_length
            tokens_file.append([*tokens[: max_length - 1], eos_id])
            line = dump_line(dict(record)).encode("utf-8")
            lines_file.write(line)
            num_bytes += len(line)
            ids.append([record["id"]])
            offsets.append([tokens_file.length])
            text_offsets.append([num_bytes])
    if not ids.length:
        raise ValueError("The corpus has no passage. Check the file it was read from.")
    every = np.load(folder / "ids.npy")
    every.sort()
    twice = every[1:][every[1:] == every[:-1]]
    if len(twice):
        raise ValueError(f"Passage id {twice[0]} is given twice. External ids must be unique.")
    return {
        "num_passages": ids.length,
        "num_tokens": tokens_file.length,
        "num_truncated": truncated,
    }


class _Npy:
    """A .npy file of one dimension that grows on disk: corpora are larger than memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.length = 0
        self._file = path.open("wb")
        self._dtype = dtype
        # Room for the header, which tells the length.
        self._file.write(b"\0" * _NPY_HEADER)

    def __enter__(self) -> "_Npy":
        return self

    def append(self, values: Sequence[int]) -> None:
        self.length += len(values)
        self._file.write(np.array(values, self._dtype).tobytes())

    def __exit__(self, *error: object) -> None:
        fields = (
            f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({self.length},), }}"
        )
        text = fields.ljust(_NPY_HEADER - 11).encode() + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        self._file.close()


def _sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(working: Path, target: Path) -> None:
    aside = working.with_name(working.name + ASIDE)
    if target.exists():
        # Killed before the next line, the old folder has lost its name: see `put_back`.
        os.replace(target, aside)
    os.replace(working, target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
