"""Passages: the corpus tokenised once, a folder of flat arrays read by external id.

    manifest.json        written last: versions, counts, fingerprints, sizes and checksums
    tokens.npy           uint16 or int32, all passages end to end, end tokens included
    offsets.npy          int64 [n + 1], where each passage's tokens start
    ids.npy              int64 [n], external ids
    passages.jsonl       the records, one a line, in the same order
    text_offsets.npy     int64 [n + 1], where each line starts

The folder appears whole or not at all. Files and examples carry external ids; `rows` turns them into
rows of this version. One text format serves memory, training and inference alike, so that a passage
is the same tokens everywhere (GLIMMER, arXiv 2306.10231, section 3).
"""

import fcntl
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.storage import local_copy
from glimmer_jax.storage.json_lines import parse_line

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ASIDE = "-old"
MANIFEST = "manifest.json"
FILES = ("tokens.npy", "offsets.npy", "ids.npy", "passages.jsonl", "text_offsets.npy")


def claim(folder: Path) -> int | None:
    """A descriptor that keeps others off the folder until it is closed; None if another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def put_back(target: Path) -> None:
    """Gives a folder its name again that a killed writer had moved aside, and not yet replaced."""
    if target.exists() or not target.parent.is_dir():
        return
    for aside in sorted(target.parent.glob(f".{target.name}.writing-*{ASIDE}")):
        if not (aside / MANIFEST).is_file():
            continue
        working = aside.with_name(aside.name.removesuffix(ASIDE))
        held = claim(working) if working.exists() else -1
        if held is None:
            return  # its writer lives, and is about to put the new folder there
        os.replace(aside, target)
        if held >= 0:
            os.close(held)
        return


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Passages:
    """A passages folder, opened for reading; arrays are memory-mapped."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], place: str) -> None:
        self.path = path
        self.place = place  # as it was given: a bucket's URL, where `path` is its copy
        self.manifest = manifest
        self.ids: np.ndarray = np.load(path / "ids.npy")
        self._tokens = np.load(path / "tokens.npy", mmap_mode="r")
        self._offsets = np.load(path / "offsets.npy", mmap_mode="r")
        self._text_offsets = np.load(path / "text_offsets.npy", mmap_mode="r")

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | None = None) -> "Passages":
        """Opens a folder after cheap checks: version, sizes, and the vocabulary if given.

        One in a bucket is copied to this disk first (`fetch`).

        Raises ValueError where the folder is missing, unfinished or damaged, of another format, or
        made with another vocabulary.
        """
        folder = local_copy.fetch_folder("PASSAGES_DIR", path, MANIFEST, FILES)
        put_back(folder)
        if not folder.is_dir():
            raise ValueError(
                f"No passages folder {path}. Write one with --run_mode=passages, or check the path."
            )
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"{path} has no {MANIFEST}: it is not a passages folder. Write one with "
                "--run_mode=passages."
            )
        try:
            manifest = parse_line((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
            version, files = manifest["format_version"], manifest["files"]
            made_with = manifest["vocabulary_fingerprint"]
        except KeyError as error:
            raise ValueError(
                f"{folder / MANIFEST} lacks {error}. Write the passages again."
            ) from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this program reads {FORMAT_VERSION}. Write "
                "the passages again with this version."
            )
        for name in FILES:
            wanted = files[name]["bytes"]
            got = (folder / name).stat().st_size if (folder / name).is_file() else None
            if got != wanted:
                found = "no such file" if got is None else f"{got} bytes"
                raise ValueError(
                    f"{folder / name}: wanted {wanted} bytes, got {found}. Copy the folder again "
                    "or write it again."
                )
        if fingerprint is not None and fingerprint != made_with:
            raise ValueError(
                f"{path} was tokenised with vocabulary {made_with}, the model's is {fingerprint}. "
                "Write the passages with the model's vocabulary, or load the matching model."
            )
        return cls(folder, manifest, os.fspath(path))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def max_length(self) -> int:
        """Most tokens of any passage, end token included."""
        return int(self.manifest["max_length"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the vocabulary."""
        return str(self.manifest["vocabulary_fingerprint"])

    def verify(self) -> None:
        """Reads every file and compares checksums. Raises ValueError naming the damaged one."""
        size = sum(wanted["bytes"] for wanted in self.manifest["files"].values())
        logger.info("reading %s once against its checksums, %.3f GB", self.path, size / 1e9)
        for name, wanted in self.manifest["files"].items():
            got = sha256(self.path / name)
            if got != wanted["sha256"]:
                raise ValueError(
                    f"{self.path / name} is damaged: wanted sha256 {wanted['sha256']}, got {got}. "
                    "Copy the folder again or write it again."
                )

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids, kind="stable")

    @functools.cached_property
    def _sorted_ids(self) -> np.ndarray:
        return self.ids[self._order]

    def rows(self, ids: Any) -> np.ndarray:
        """External ids, any shape -> int32 rows of the same shape; -1 (no passage) stays -1.

        Raises ValueError naming the ids that are not in this folder.
        """
        wanted = np.asarray(ids, np.int64)
        places = np.minimum(np.searchsorted(self._sorted_ids, wanted), len(self) - 1)
        absent = wanted == -1
        unknown = (self._sorted_ids[places] != wanted) & ~absent
        if unknown.any():
            some = np.unique(wanted[unknown])
            shown = ", ".join(str(one) for one in some[:5]) + (", …" if len(some) > 5 else "")
            raise ValueError(
                f"{len(some)} passage ids are not in {self.path}: {shown}. The examples were "
                "retrieved from another corpus: retrieve again from this one."
            )
        return np.where(absent, -1, self._order[places]).astype(np.int32)

    def lengths(self, rows: Any) -> np.ndarray:
        """Rows, any shape -> int32 numbers of tokens of the same shape, 0 for row -1."""
        rows = np.asarray(rows, np.int64)
        spans = self._offsets[np.maximum(rows, 0) + 1] - self._offsets[np.maximum(rows, 0)]
        return np.where(rows < 0, 0, spans).astype(np.int32)

    def warn_of_cuts(self, length: int) -> None:
        """Logs how many passages `tokens` would cut at `length`, if it is any."""
        count = int((np.diff(self._offsets) > length).sum())
        if count:
            logger.warning(
                "%d of %d passages of %s are longer than %d tokens and are cut.",
                count, len(self), self.path, length,
            )  # fmt: skip

    def tokens(self, rows: Any, length: int) -> np.ndarray:
        """Rows [...] -> int32 tokens [..., length], left-aligned, 0 beyond; all 0 for row -1.

        Longer passages are cut at `length`, and lose their end token with the rest.
        """
        rows = np.asarray(rows, np.int64)
        found = np.zeros((rows.size, length), np.int32)
        lengths = np.minimum(self.lengths(rows.ravel()), length)
        for place, (row, count) in enumerate(zip(rows.ravel(), lengths, strict=True)):
            start = self._offsets[max(row, 0)]
            found[place, :count] = self._tokens[start : start + count]
        return found.reshape(*rows.shape, length)

    def text(self, row: int) -> dict[str, Any]:
        """The record of one row. Raises ValueError for a row that is not there."""
        if not 0 <= row < len(self):
            raise ValueError(f"Rows of {self.path} go from 0 to {len(self) - 1}, got {row}.")
        with (self.path / "passages.jsonl").open("rb") as file:
            file.seek(int(self._text_offsets[row]))
            line = file.read(int(self._text_offsets[row + 1] - self._text_offsets[row]))
        return parse_line(line, f"{self.path / 'passages.jsonl'}, row {row}")

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """The records of rows [start, stop), by default of all, in order."""
        path = self.path / "passages.jsonl"
        rows = range(start, len(self) if stop is None else stop)
        with path.open("rb") as file:
            file.seek(int(self._text_offsets[start]))
            for row in rows:
                yield parse_line(file.readline(), f"{path}, row {row}")
