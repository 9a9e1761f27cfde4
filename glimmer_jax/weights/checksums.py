"""A checksum file: the sha256 of every file of a finished folder, written last.

Orbax does not detect flipped bits in array data. This file detects them, and its presence shows that
the folder was complete. It lies inside the folder, so that copies of the folder can be verified.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from glimmer_jax.storage.errors import DamagedData
from glimmer_jax.storage.folder import in_bucket, open_folder, read_file, sync
from glimmer_jax.storage.lines import is_regular_file

SIDECAR = "checksums.json"
_PARTIAL = ".partial"  # suffix of files that are being written, which nothing reads
_CHUNK = 1 << 22


class DamagedCheckpoint(DamagedData):
    """The files of a checkpoint are not those that were written."""


def write_sidecar(folder: Any) -> None:
    """Writes `checksums.json` into a folder (local or in a bucket) whose files are final."""
    folder = epath.Path(folder)
    _write_digests(folder, {name: _digest(folder / name) for name in _files(folder)})


def replace_file(folder: Any, name: str, data: bytes) -> None:
    """Replaces a file of a finished folder. A kill leaves the old file or the new one, each intact."""
    folder = epath.Path(folder)
    digests, new = _read_digests(folder), hashlib.sha256(data).hexdigest()
    _write_digests(folder, {**digests, name: [*_accepted(digests, name), new]})
    _write(folder / name, data)
    _write_digests(folder, {**digests, name: new})


def _write_digests(folder: epath.Path, digests: Mapping[str, str | list[str]]) -> None:
    _write(folder / SIDECAR, json.dumps({"sha256": digests}, indent=1, sort_keys=True).encode())


def _write(path: epath.Path, data: bytes) -> None:
    """Renamed into place, so that the file is complete or absent."""
    partial = path.with_name(f"{path.name}{_PARTIAL}")
    partial.write_bytes(data)
    if in_bucket(path):
        partial.replace(path)
        return
    sync(pathlib.Path(partial))
    partial.replace(path)
    sync(pathlib.Path(path).parent)


def _accepted(digests: Mapping[str, Any], name: str) -> list[Any]:
    """The checksums that a file may have: one, or two while it is being replaced."""
    known = digests.get(name)
    return known if isinstance(known, list) else [known]


def has_sidecar(folder: Any) -> bool:
    """Whether the folder was finished and has its checksums."""
    return is_regular_file(epath.Path(folder) / SIDECAR)


def verify_sidecar(folder: Any) -> None:
    """Reads every file of a folder and compares it with the checksums.

    Raises:
      DamagedCheckpoint: there are no checksums, or files are missing, changed or not listed. The
        message names all of them.
    """
    folder = epath.Path(folder)
    digests = _read_digests(folder)
    files = set(_files(folder))
    missing = sorted(digests.keys() - files)
    unlisted = sorted(files - digests.keys())
    changed = sorted(
        name
        for name in files & digests.keys()
        # Reading a pipe or a device may block forever.
        if not is_regular_file(folder / name)
        or _digest(folder / name) not in _accepted(digests, name)
    )
    if missing or changed or unlisted:
        raise DamagedCheckpoint(
            f"Checkpoint {folder} is damaged: missing files {missing}, changed files {changed}, "
            f"files without a checksum {unlisted}. Copy it again, or use another step."
        )


def read_verified(folder: Any, name: str) -> bytes:
    """The bytes of one file of a folder.

    Raises:
      DamagedCheckpoint: the file is missing or changed, or there are no checksums.
    """
    folder = epath.Path(folder)
    digests = _read_digests(folder)
    data = (folder / name).read_bytes() if is_regular_file(folder / name) else None
    if data is None or hashlib.sha256(data).hexdigest() not in _accepted(digests, name):
        problem = "missing" if data is None else "changed"
        raise DamagedCheckpoint(
            f"Checkpoint {folder} is damaged: file {name} is {problem}. Copy it again, or use another "
            "step."
        )
    return data


def _read_digests(folder: epath.Path) -> dict[str, Any]:
    if not has_sidecar(folder):
        raise DamagedCheckpoint(
            f"Checkpoint {folder} has no {SIDECAR}: it was not finished, or was copied without that "
            "file. Use another step."
        )
    try:
        content = json.loads(read_file(open_folder(folder), SIDECAR) or b"")
    except (ValueError, RecursionError):
        content = None
    digests = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(digests, dict):
        raise DamagedCheckpoint(
            f"Checkpoint {folder} is damaged: {SIDECAR} holds no table of checksums. Copy it again, or "
            "use another step."
        )
    return digests


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names = []
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            if os.path.islink(child):
                raise DamagedCheckpoint(
                    f"{child} is a symbolic link to a folder, and a checkpoint has none. Remove it, or "
                    "copy the checkpoint again."
                )
            names += _files(child, f"{prefix}{child.name}/")
        elif prefix + child.name != SIDECAR and not child.name.endswith(_PARTIAL):
            names.append(prefix + child.name)
    return names


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
