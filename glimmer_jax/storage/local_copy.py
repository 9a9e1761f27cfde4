"""Local copies of files in buckets, for memory maps and libraries that only read local files.

    ~/.cache/glimmer_jax/fetched/<SHA-256 of the URL>/<generation>-<SHA-256>/<file>
    ~/.cache/glimmer_jax/fetched/<SHA-256 of the manifest>/<file>

The names identify the content, so that the copy of a replaced file is never used for the new one.
Copies are complete or absent, and processes of one machine share them. The environment variable
GLIMMER_CACHE replaces `~/.cache/glimmer_jax`. Copies are never evicted automatically; delete them
while no job runs.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.storage import folder
from glimmer_jax.storage.folder import in_bucket
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.storage.lease import LockUnsupported, try_lock

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "GLIMMER_CACHE"
BLOCK_BYTES = 32 * 2**20  # per request
_REQUESTS = 8
Wanted = dict[str, tuple[int, str]]  # file -> bytes, SHA-256


def fetch_file(name: str, path: Any) -> Path:
    """The local file, or a local copy of a file in a bucket, refreshed if the file has changed.

    Args:
      name: the setting that holds the path, for messages.
      path: local, or a URL that TensorStore knows.

    Raises:
      ValueError: the bucket has no such file.
      StorageError: the bucket did not answer, or denied access.
    """
    if not in_bucket(path):
        return Path(path)
    bucket, file = folder.of_file(path)
    place = _cache() / _sha256(os.fspath(path).encode())
    known, copies = None, sorted(place.glob(f"*/{file}"), key=os.path.getmtime) if file else []
    if copies:
        of, _, sha256 = copies[-1].parent.name.partition("-")
        known = bytes.fromhex(of) if _sha256(copies[-1].read_bytes()) == sha256 else None
    result = folder.read_if_new(bucket, file, known) if file else None
    if result is None:
        raise ValueError(f"{name}: there is no file {path}. Check the path.")
    data, generation = result
    if data is None:
        return copies[-1]
    target = place / f"{generation.hex()}-{_sha256(data)}" / file
    folder.write_file(*folder.of_file(target), data)
    return target


def fetch_folder(name: str, path: Any, manifest: str, files: Sequence[str]) -> Path:
    """The local folder, or a local copy of a folder in a bucket, checked against its manifest.

    Args:
      name: the setting that holds the path, for messages.
      path: local, or a URL that TensorStore knows.
      manifest: name of a JSON file `{"files": {file: {"bytes": int, "sha256": str}}}`.
      files: files to copy with it.

    Raises:
      ValueError: the folder is missing, a file does not match the manifest, or the disk is too
        small.
      StorageError: the bucket did not answer, or denied access.
    """
    if not in_bucket(path):
        return Path(path)
    kvstore = folder.open_folder(path)
    data = folder.read_file(kvstore, manifest)
    if data is None:
        raise ValueError(f"{name}: there is no {kvstore.url}{manifest}. Check the path.")
    target = _cache() / _sha256(data)
    try:
        listed = parse_line(data, f"{kvstore.url}{manifest}")["files"]
        wanted = {file: (int(listed[file]["bytes"]), listed[file]["sha256"]) for file in files}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name}: {kvstore.url}{manifest} does not list {', '.join(files)} correctly "
            f"({error!r}). Write the folder again."
        ) from None
    wanted[manifest] = len(data), _sha256(data)
    if _missing(target, wanted):
        with _alone(target) as locked:
            _copy(name, kvstore, wanted, target, locked)
    return target


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cache() -> Path:
    home = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "glimmer_jax"
    return Path(home) / "fetched"


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """One process of this machine at a time; the others wait for its copy.

    Without locks, as on some network file systems, each process makes a copy of its own; then the
    value is False.
    """
    target.mkdir(parents=True, exist_ok=True)
    lock = target / "lock"
    lock.touch()
    descriptor, waiting = None, False
    try:
        while (descriptor := try_lock(lock)) is None:
            if not waiting:
                logger.info("Another process fetches %s; waiting for it.", target)
            waiting = True
            STOP.poll()
            time.sleep(0.1)
    except LockUnsupported as error:
        logger.warning("%s; other processes may copy the same files.", error)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _missing(target: Path, wanted: Wanted) -> Wanted:
    """Files without a complete copy; only complete files have their names."""
    return {
        file: (size, sha256)
        for file, (size, sha256) in wanted.items()
        if not (target / file).is_file() or (target / file).stat().st_size != size
    }


def _copy(name: str, kvstore: ts.KvStore, wanted: Wanted, target: Path, locked: bool) -> None:
    """Copies missing files, for instance after an interrupted copy or a deletion."""
    if locked:  # They are leftovers of killed processes.
        for partial in target.glob("*.partial"):
            partial.unlink()
    missing = _missing(target, wanted)
    total, room = sum(size for size, _ in missing.values()), shutil.disk_usage(target).free
    if total > room:
        raise ValueError(
            f"{name}: {kvstore.url} needs {total / 1e9:.3g} GB on this disk, and {target} has "
            f"{room / 1e9:.3g} GB left. Make room, or set {CACHE_VARIABLE} to a folder of a larger disk."
        )
    if missing:
        logger.info("%s: fetching %.3g GB of %s to %s", name, total / 1e9, kvstore.url, target)
    progress = Progress(name, total, "bytes")
    for file, (size, sha256) in missing.items():
        digest = hashlib.sha256()
        partial = target / f"{file}.{os.getpid()}.{threading.get_ident()}.partial"
        with open(partial, "wb") as copy:
            for block in _blocks(kvstore, file, size):
                digest.update(block)
                copy.write(block)
                progress.advance(len(block))
                STOP.poll("Stopped fetching. Run the same command again to resume.")
            copy.flush()
            os.fsync(copy.fileno())
        if (got := digest.hexdigest()) != sha256:
            partial.unlink()
            raise ValueError(
                f"{name}: {kvstore.url}{file} is damaged: expected sha256 {sha256}, got {got}. Copy the "
                "folder into the bucket again."
            )
        os.replace(partial, target / file)


def _blocks(kvstore: ts.KvStore, file: str, size: int) -> Iterator[bytes]:
    """The blocks of a file in order, with several requests in flight."""
    in_flight: collections.deque[concurrent.futures.Future[bytes]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS, "fetch") as pool:
        for start in range(0, size, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size)
            in_flight.append(pool.submit(folder.read_range, kvstore, file, start, stop))
            if len(in_flight) == _REQUESTS:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
