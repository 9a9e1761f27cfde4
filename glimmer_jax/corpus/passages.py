"""Passages: the tokenised corpus, a folder of flat arrays read by row.

    manifest.json        written last, see `manifest`
    tokens.npy           uint16 or int32, all passages end to end, end tokens included
    offsets.npy          int64 [n + 1], where each passage's tokens start
    ids.npy              int64 [n], numbers of the external ids, see `ids`
    passages.jsonl       the records, one per line, in the same order
    text_offsets.npy     int64 [n + 1], where each line starts

Files and examples carry external ids, batches carry numbers, and `rows` maps numbers to rows of this
folder. One text format serves memory, training and inference, so that a passage has the same tokens
everywhere (GLIMMER, arXiv 2306.10231, section 3).

Every byte is compared with a checksum before it is used (`checked_file`), and every value with the range
that the manifest gives.
"""

import contextlib
import functools
import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.corpus.checked_file import CheckedArray, CheckedFile
from glimmer_jax.corpus.ids import describe_numbers, id_number
from glimmer_jax.corpus.manifest import FILES, MANIFEST, read_manifest, token_dtype
from glimmer_jax.storage import local_copy
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.storage.lease import LockUnsupported, try_lock

logger = logging.getLogger(__name__)

BACKUP_SUFFIX = "-old"
_INT64 = np.dtype("<i8")
_RECORDS_AT_ONCE = 1024


def restore_backup(target: Path) -> None:
    """Renames the backup of a folder back, where a writer was killed before replacing the folder."""
    if target.exists() or not target.parent.is_dir():
        return
    for backup in sorted(
        target.parent.glob(f".{glob.escape(target.name)}.writing-*{BACKUP_SUFFIX}")
    ):
        if not (backup / MANIFEST).is_file():
            continue
        working = backup.with_name(backup.name.removesuffix(BACKUP_SUFFIX))
        with contextlib.ExitStack() as stack:
            # Without locks the backup is restored: a running writer fails, and nothing is lost.
            with contextlib.suppress(FileNotFoundError, LockUnsupported):
                if (lock := try_lock(working)) is None:
                    return  # The writer is running and about to rename the new folder.
                stack.callback(os.close, lock)
            os.replace(backup, target)
        return


class Passages:
    """A passages folder, opened for reading; all but the ids stays on disk.

    Attributes:
      path: the folder on this disk.
      place: the folder as it was given, possibly a bucket's URL.
      manifest: see `manifest`.
      ids: int64 [n], numbers of the external ids.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], place: str) -> None:
        self.path = path
        self.place = place
        self.manifest = manifest
        self._files = {
            name: CheckedFile(path / name, manifest["files"][name]["blocks"]) for name in FILES
        }
        count = manifest["num_passages"]
        self._num_tokens = manifest["num_tokens"]
        dtype = token_dtype(manifest["vocab_size"])
        self._tokens = CheckedArray(self._files["tokens.npy"], dtype, self._num_tokens)
        self._offsets = CheckedArray(self._files["offsets.npy"], _INT64, count + 1)
        self._text_offsets = CheckedArray(self._files["text_offsets.npy"], _INT64, count + 1)
        ids = CheckedArray(self._files["ids.npy"], _INT64, count)
        self.ids: np.ndarray = ids.slice(0, count).astype(np.int64)

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | None = None) -> "Passages":
        """Opens a folder; one in a bucket is copied to this disk first.

        Args:
          path: local, or a bucket's URL.
          fingerprint: of the vocabulary; None skips the comparison.

        Raises:
          ValueError: the folder is missing, unfinished, damaged, of another format, or was tokenised
            with another vocabulary.
        """
        folder = local_copy.fetch_folder("PASSAGES_DIR", path, MANIFEST, FILES)
        restore_backup(folder)
        manifest = read_manifest(folder)
        vocabulary = manifest["vocabulary_fingerprint"]
        if fingerprint is not None and fingerprint != vocabulary:
            raise ValueError(
                f"PASSAGES_DIR: {path} was tokenised with vocabulary {vocabulary}, the model's is "
                f"{fingerprint}. Rerun --run_mode=passages with the model's VOCABULARY, or load the "
                "matching model."
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

    @property
    def corpus_sha256(self) -> str:
        """Hash of the passages' records: ids, titles and texts, but not tokens."""
        return str(self.manifest["files"]["passages.jsonl"]["sha256"])

    @property
    def have_pages(self) -> bool:
        """Whether every passage names its page."""
        return bool(self.manifest["num_pages"] == len(self))

    def verify(self) -> None:
        """Reads every file and compares checksums and values. Raises ValueError naming the damage."""
        size = sum(entry["bytes"] for entry in self.manifest["files"].values())
        logger.info("verifying the checksums of %s, %.3f GB", self.path, size / 1e9)
        for name, entry in self.manifest["files"].items():
            with (self.path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise ValueError(
                    f"{self.path / name} is damaged: expected sha256 {entry['sha256']}, got {digest}. "
                    "Delete the folder and copy it again, or rerun --run_mode=passages."
                )
        for start in range(0, len(self), 2**20):
            self.lengths(np.arange(start, min(start + 2**20, len(self))))
        self._sorted_ids  # noqa: B018

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.ids, kind="stable")

    @functools.cached_property
    def _sorted_ids(self) -> np.ndarray:
        ids = self.ids[self._order]
        if ids[0] < 0 or (ids[1:] == ids[:-1]).any():
            raise ValueError(
                f"{self.path / 'ids.npy'}: ids must be distinct and not negative. Rerun "
                "--run_mode=passages."
            )
        return ids

    def rows(self, numbers: Any) -> np.ndarray:
        """Numbers of ids, any shape -> int32 rows of the same shape; -1 (no passage) stays -1.

        Raises ValueError naming the ids that are not in this folder.
        """
        return self._rows(np.asarray(numbers, np.int64))

    def rows_of(self, external_ids: Sequence[int | str]) -> np.ndarray:
        """External ids -> int32 rows [n]. Raises ValueError naming the ids not in this folder."""
        numbers = np.array([id_number(name) for name in external_ids], np.int64)
        return self._rows(numbers, external_ids)

    def external_ids(self, numbers: Sequence[int]) -> list[int | str]:
        """Numbers -> external ids. Raises ValueError for numbers that are not in this folder."""
        rows = self.rows(numbers)
        if not self.manifest["num_string_ids"]:
            return [int(number) for number in numbers]
        return [self.record(int(row))["id"] for row in rows]

    def titles(self, numbers: Any) -> list[str]:
        """Numbers [n] -> titles. Raises ValueError for numbers that are not in this folder."""
        return [self.record(int(row))["title"] for row in self.rows(numbers)]

    def _rows(self, numbers: np.ndarray, names: Sequence[int | str] | None = None) -> np.ndarray:
        places = np.minimum(np.searchsorted(self._sorted_ids, numbers), len(self) - 1)
        absent = numbers == -1
        unknown = (self._sorted_ids[places] != numbers) & ~absent
        if unknown.any():
            missing = np.unique(numbers[unknown])
            shown = describe_numbers(missing)
            if names is not None:
                texts = sorted({str(name) for name in np.array(names, object)[unknown]})
                shown = ", ".join(texts[:5]) + (", …" if len(texts) > 5 else "")
            raise ValueError(
                f"{len(missing)} passage ids are not in {self.path}: {shown}. The examples were "
                "retrieved from another corpus: rerun --run_mode=retrieve with this one."
            )
        return np.where(absent, -1, self._order[places]).astype(np.int32)

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and number of tokens, 0 for row -1, of rows of any shape."""
        first = np.maximum(rows, 0)
        starts, stops = self._offsets.take(first), self._offsets.take(first + 1)
        counts = stops - starts
        if ((counts < 1) | (counts > self.max_length) | (starts < 0)).any() or (
            stops > self._num_tokens
        ).any():
            raise ValueError(
                f"{self.path / 'offsets.npy'}: passages must have 1 to {self.max_length} tokens, one "
                "after another. Rerun --run_mode=passages."
            )
        return starts, np.where(rows < 0, 0, counts)

    def lengths(self, rows: Any) -> np.ndarray:
        """Rows, any shape -> int32 numbers of tokens of the same shape, 0 for row -1."""
        return self._spans(np.asarray(rows, np.int64))[1].astype(np.int32)

    def warn_of_cuts(self, length: int) -> None:
        """Logs how many passages `tokens` would truncate at `length`, if any."""
        offsets = self._offsets.slice(0, len(self) + 1)
        count = int((np.diff(offsets) > length).sum())
        if count:
            logger.warning(
                "%d of %d passages of %s are longer than %d tokens and are truncated.",
                count, len(self), self.path, length,
            )  # fmt: skip

    def tokens(self, rows: Any, length: int) -> np.ndarray:
        """Rows [...] -> int32 tokens [..., length], left-aligned, 0 beyond; all 0 for row -1.

        Longer passages are truncated at `length`, and lose their end token with the rest.
        """
        rows = np.asarray(rows, np.int64)
        tokens = np.zeros((rows.size, length), np.int32)
        starts, counts = self._spans(rows.ravel())
        counts = np.minimum(counts, length)
        for index, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
            tokens[index, :count] = self._tokens.slice(start, start + count)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.manifest["vocab_size"]:
            raise ValueError(
                f"{self.path / 'tokens.npy'}: token ids must be below "
                f"{self.manifest['vocab_size']}, the vocabulary's size. Rerun --run_mode=passages."
            )
        return tokens.reshape(*rows.shape, length)

    def record(self, row: int) -> dict[str, Any]:
        """The record of one row. Raises ValueError for a row out of range, and for a damaged one."""
        if not 0 <= row < len(self):
            raise ValueError(f"Rows of {self.path} are 0 to {len(self) - 1}, got {row}.")
        return next(self.records(row, row + 1))

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """The records of rows [start, stop), by default of all, in order."""
        path, file = self.path / "passages.jsonl", self._files["passages.jsonl"]
        stop = len(self) if stop is None else stop
        for first in range(start, stop, _RECORDS_AT_ONCE):
            last = min(first + _RECORDS_AT_ONCE, stop)
            offsets = self._text_offsets.slice(first, last + 1)
            if offsets[0] < 0 or offsets[-1] > len(file.bytes) or (np.diff(offsets) < 1).any():
                raise ValueError(
                    f"{self.path / 'text_offsets.npy'}: offsets must increase from 0 to the size of "
                    "passages.jsonl. Rerun --run_mode=passages."
                )
            for row in range(first, last):
                begin, end = offsets[row - first : row - first + 2].tolist()
                record = parse_line(file.read(begin, end).tobytes(), f"{path}, row {row}")
                if not isinstance(record.get("title"), str) or "id" not in record:
                    raise ValueError(
                        f"{path}, row {row}: expected an id and a title, got {sorted(record)}. Rerun "
                        "--run_mode=passages."
                    )
                yield record
