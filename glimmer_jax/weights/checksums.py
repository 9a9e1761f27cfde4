"""A checksum sidecar: sha256 of every file of a finished folder, written last.

Orbax does not notice flipped bits in array data. The sidecar does, and its presence says that the
folder was complete when it was written. It lies inside the folder, so that a copy of the folder can
be verified wherever it goes.
"""

import hashlib
import json
from typing import Any

from etils import epath

SIDECAR = "checksums.json"
_CHUNK = 1 << 22


def write_sidecar(folder: Any) -> None:
    """Writes `checksums.json` into a folder (local or bucket) whose files are final."""
    folder = epath.Path(folder)
    digests = {name: _digest(folder / name) for name in _files(folder)}
    # Renamed into place: a sidecar is there with all its lines or not at all.
    partial = folder / f"{SIDECAR}.partial"
    partial.write_text(json.dumps({"sha256": digests}, indent=1, sort_keys=True))
    partial.replace(folder / SIDECAR)


def has_sidecar(folder: Any) -> bool:
    """True if the folder was finished and has its checksums."""
    return (epath.Path(folder) / SIDECAR).exists()


def verify_sidecar(folder: Any) -> None:
    """Reads every file of the folder and compares it with the sidecar.

    Raises:
      ValueError: no sidecar, or files are missing, or their contents changed; all are named.
    """
    folder = epath.Path(folder)
    if not has_sidecar(folder):
        raise ValueError(
            f"{folder} has no {SIDECAR}: it was not finished when its writer stopped, or was "
            "copied without it. Use another step."
        )
    digests = json.loads((folder / SIDECAR).read_text())["sha256"]
    missing = sorted(name for name in digests if not (folder / name).exists())
    changed = sorted(
        name
        for name, digest in digests.items()
        if name not in missing and _digest(folder / name) != digest
    )
    if missing or changed:
        raise ValueError(
            f"Checkpoint {folder} is damaged: missing files {missing}, changed files {changed}. "
            "Copy it again from its source, or use another step."
        )


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names = []
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            names += _files(child, f"{prefix}{child.name}/")
        elif not child.name.startswith(SIDECAR):
            names.append(prefix + child.name)
    return names


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
