"""Writes a passages folder (`passages`) atomically: complete and on disk before it gets its name."""

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.checked_file import NPY_HEADER_BYTES, file_checksums, npy_header
from glimmer_jax.corpus.ids import id_number
from glimmer_jax.corpus.manifest import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    token_dtype,
    write_manifest,
)
from glimmer_jax.corpus.passages import BACKUP_SUFFIX, restore_backup
from glimmer_jax.storage.folder import local, sync
from glimmer_jax.storage.json_lines import dump_line, parse_line
from glimmer_jax.storage.lease import LockUnsupported, try_lock
from glimmer_jax.vocabulary import EOS_ID, passage_text

_INT64 = np.dtype("<i8")


def check_absent(path: str | Path, overwrite: bool) -> None:
    """Raises ValueError where a folder exists and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise ValueError(
            f"{path} exists already. Remove it, write elsewhere, or set OVERWRITE=True."
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
    unk_id: int | None = None,
    source: str = "",
    overwrite: bool = False,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes a passages folder; returns its manifest.

    Args:
      path: the folder to create.
      records: `{"id", "title", "text", …}`, in the order of the rows; further fields are kept.
      encode: text to token ids, without end token.
      fingerprint: of the vocabulary behind `encode`.
      max_length: most tokens that a passage keeps, the end token included.
      vocab_size: above every token id.
      eos_id: the end token.
      unk_id: the unknown token, to be counted; None counts none.
      source: name of the corpus, for people.
      overwrite: replace an existing folder.
      before: called when the folder is complete, before it appears at `path`.

    Raises:
      ValueError: the folder exists, an id occurs twice, two ids have one number, a token id is out of
        range, there is no passage, or `max_length` is below 2.
    """
    target = local("PASSAGES_DIR", path)
    if max_length < 2:
        raise ValueError(
            f"MAX_PASSAGE_TOKENS must be at least 2, a token and the end token, got {max_length}."
        )
    restore_backup(target)
    check_absent(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    working = target.parent / f".{target.name}.writing-{os.getpid()}"
    for left in (working, _backup(working)):  # of a killed writer with this process's id
        shutil.rmtree(left, ignore_errors=True)
    working.mkdir()
    try:
        lock = try_lock(working)
    except LockUnsupported:
        lock = None
    try:
        counts = _write_arrays(working, records, encode, max_length, vocab_size, eos_id, unk_id)
        _check_ids(working)
        manifest = {
            "format_version": FORMAT_VERSION,
            **counts,
            "max_length": max_length,
            "vocabulary_fingerprint": fingerprint,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "source": source,
            "files": {name: file_checksums(working / name) for name in FILES},
        }
        manifest = write_manifest(working, manifest)
        # Synced before the rename: a power cut must not leave the name without the bytes.
        for part in (*FILES, MANIFEST, "."):
            sync(working / part)
        before()
        _move_into_place(working, target)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    # The new folder is in place, so what killed writers left behind is useless.
    for stale in target.parent.glob(f".{glob.escape(target.name)}.writing-*"):
        if not stale.is_dir():  # removing a pipe as a folder would block
            continue
        # Without locks it is unknown whether a writer is running, so its folder stays.
        with contextlib.suppress(FileNotFoundError, LockUnsupported):
            if (stale_lock := try_lock(stale)) is not None:
                shutil.rmtree(stale, ignore_errors=True)
                os.close(stale_lock)
    return manifest


def _write_arrays(
    folder: Path,
    records: Iterable[Mapping[str, Any]],
    encode: Callable[[str], Sequence[int]],
    max_length: int,
    vocab_size: int,
    eos_id: int,
    unk_id: int | None,
) -> dict[str, int]:
    """Writes all files but the manifest; returns its counts."""
    truncated = unknown = pages = strings = text_bytes = 0
    with contextlib.ExitStack() as stack:
        tokens_file = stack.enter_context(
            _NpyWriter(folder / "tokens.npy", token_dtype(vocab_size))
        )
        ids, offsets, text_offsets = (
            stack.enter_context(_NpyWriter(folder / f"{name}.npy", _INT64))
            for name in ("ids", "offsets", "text_offsets")
        )
        lines_file = stack.enter_context((folder / "passages.jsonl").open("wb"))
        offsets.append([0])
        text_offsets.append([0])
        for record in records:
            tokens = list(encode(passage_text(record["title"], record["text"])))
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise ValueError(
                    f"Passage {record['id']!r} has a token id outside 0..{vocab_size - 1}. Give the "
                    "vocab_size of the vocabulary that encodes."
                )
            truncated += len(tokens) >= max_length
            unknown += 0 if unk_id is None else tokens.count(unk_id)
            pages += record.get("page") is not None
            strings += isinstance(record["id"], str)
            tokens_file.append([*tokens[: max_length - 1], eos_id])
            line = dump_line(dict(record)).encode("utf-8")
            lines_file.write(line)
            text_bytes += len(line)
            ids.append([id_number(record["id"])])
            offsets.append([tokens_file.length])
            text_offsets.append([text_bytes])
    if not ids.length:
        raise ValueError("CORPUS has no passage. Check the file that was read.")
    return {
        "num_passages": ids.length,
        "num_tokens": tokens_file.length,
        "num_truncated": truncated,
        "num_unknown": unknown,
        "num_pages": pages,
        "num_string_ids": strings,
    }


def _check_ids(folder: Path) -> None:
    """Raises ValueError for two passages with one id, and for two ids with one number."""
    ids = np.load(folder / "ids.npy")
    ids.sort()
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if not repeated.size:
        return
    ids = np.load(folder / "ids.npy")
    text_offsets = np.load(folder / "text_offsets.npy", mmap_mode="r")
    names = []
    for row in np.flatnonzero(ids == repeated[0])[:2].tolist():
        with (folder / "passages.jsonl").open("rb") as file:
            file.seek(int(text_offsets[row]))
            names.append(parse_line(file.readline(), f"row {row}")["id"])
    if str(names[0]) == str(names[1]):
        raise ValueError(f"CORPUS: passage id {names[0]!r} occurs twice. Ids must be unique.")
    raise ValueError(
        f"CORPUS: passage ids {names[0]!r} and {names[1]!r} have the same 63-bit number. Rename one."
    )


class _NpyWriter:
    """A .npy file of one dimension that is appended to: corpora are larger than memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.length = 0
        self._file = path.open("wb")
        self._dtype = dtype
        # The header holds the length, so it is written at the end.
        self._file.write(b"\0" * NPY_HEADER_BYTES)

    def __enter__(self) -> "_NpyWriter":
        return self

    def append(self, values: Sequence[int]) -> None:
        self.length += len(values)
        self._file.write(np.array(values, self._dtype).tobytes())

    def __exit__(self, *error: object) -> None:
        self._file.seek(0)
        self._file.write(npy_header(self._dtype, self.length))
        self._file.close()


def _backup(working: Path) -> Path:
    return working.with_name(working.name + BACKUP_SUFFIX)


def _move_into_place(working: Path, target: Path) -> None:
    backup = _backup(working)
    if target.exists():
        # If the writer is killed before the next line, `restore_backup` renames it back.
        os.replace(target, backup)
    os.replace(working, target)
    sync(target.parent)
    shutil.rmtree(backup, ignore_errors=True)
