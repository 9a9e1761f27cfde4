"""Files of a bucket on this machine's disk, for libraries and memory maps that read nothing else.

    ~/.cache/glimmer_jax/fetched/<sha256>/<file>

Named by what is in them, so that a file that was replaced in the bucket is never taken for the new one.
Copies appear whole or not at all, and processes of one machine share them. The environment variable
GLIMMER_CACHE names another folder than `~/.cache/glimmer_jax`; what is in it may be deleted at any time.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from glimmer_jax import folder

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "GLIMMER_CACHE"
BLOCK_BYTES = 32 * 2**20  # asked of a bucket at once
_AT_ONCE = 8
_EVERY_SECONDS = 10.0


def in_bucket(path: Any) -> bool:
    """Whether a path is a URL such as `gs://bucket/file`."""
    return "://" in os.fspath(path)


def fetch_file(name: str, path: Any) -> Path:
    """The file; of a bucket's, a copy on this disk.

    Args:
      name: the setting that holds the path, for messages.
      path: local, or a URL that TensorStore knows.

    Raises:
      ValueError: the bucket has no such file.
      OSError: the bucket did not answer, or refused.
    """
    if not in_bucket(path):
        return Path(path)
    parent, _, file = os.fspath(path).rpartition("/")
    data = folder.read_file(folder.open_folder(parent), file) if file else None
    if data is None:
        raise ValueError(f"{name}: there is no file {path}. Check the path.")
    target = _cache() / hashlib.sha256(data).hexdigest() / file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{file}.{os.getpid()}.partial")
        partial.write_bytes(data)
        os.replace(partial, target)
    return target


def fetch_folder(name: str, path: Any, manifest: str, files: Sequence[str]) -> Path:
    """The folder; of a bucket's, a copy on this disk, each file checked against the manifest.

    Args:
      name: the setting that holds the path, for messages.
      path: local, or a URL that TensorStore knows.
      manifest: name of a JSON file `{"files": {file: {"bytes": int, "sha256": str}}}`.
      files: that are copied with it.

    Raises:
      ValueError: there is no such folder, a file is not what the manifest says, or the disk is too small.
      OSError: the bucket did not answer, or refused.
    """
    if not in_bucket(path):
        return Path(path)
    kvstore = folder.open_folder(path)
    data = folder.read_file(kvstore, manifest)
    if data is None:
        raise ValueError(f"{name}: there is no {kvstore.url}{manifest}. Check the path.")
    target = _cache() / hashlib.sha256(data).hexdigest()
    if (target / manifest).is_file():
        return target
    try:
        wanted = {file: json.loads(data)["files"][file] for file in files}
        total = sum(int(one["bytes"]) for one in wanted.values())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: {kvstore.url}{manifest} does not say what it should of {', '.join(files)} "
            f"({error!r}). Write the folder again."
        ) from None
    with _alone(target):
        if not (target / manifest).is_file():
            _copy(name, kvstore, wanted, total, target)
            (target / f"{manifest}.partial").write_bytes(data)
            os.replace(target / f"{manifest}.partial", target / manifest)
    return target


def _cache() -> Path:
    home = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "glimmer_jax"
    return Path(home) / "fetched"


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process of this machine at a time; the others wait for its copy."""
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process fetches %s; waiting for it.", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(
    name: str, kvstore: ts.KvStore, wanted: Mapping[str, Any], total: int, target: Path
) -> None:
    """Copies what is not there; a copy that was cut short goes on with the files that are whole."""
    begun = told = time.monotonic()
    done, copied = 0, 0
    left = {file: one for file, one in wanted.items() if not _is_whole(target / file, one["bytes"])}
    room = shutil.disk_usage(target).free
    needed = sum(one["bytes"] for one in left.values())
    if needed > room:
        raise ValueError(
            f"{name}: {kvstore.url} wants {needed / 1e9:.3g} GB on this disk, and {target} has "
            f"{room / 1e9:.3g} GB left. Make room, or set {CACHE_VARIABLE} to a folder of a larger disk."
        )
    logger.info("%s: fetching %.3g GB of %s to %s", name, needed / 1e9, kvstore.url, target)
    done = total - needed
    for file, one in left.items():
        digest = hashlib.sha256()
        partial = target / f"{file}.partial"
        with open(partial, "wb") as copy:
            for block in _blocks(kvstore, file, one["bytes"]):
                digest.update(block)
                copy.write(block)
                done, copied = done + len(block), copied + len(block)
                if time.monotonic() - told >= _EVERY_SECONDS:
                    told = time.monotonic()
                    rate = copied / (told - begun)
                    logger.info(
                        "%s: %.2f of %.2f GB, %.0f MB/s, %.0f s left",
                        name, done / 1e9, total / 1e9, rate / 1e6, (total - done) / rate,
                    )  # fmt: skip
        if (got := digest.hexdigest()) != one["sha256"]:
            partial.unlink()
            raise ValueError(
                f"{name}: {kvstore.url}{file} is damaged: wanted sha256 {one['sha256']}, got {got}. "
                "Copy the folder into the bucket again."
            )
        os.replace(partial, target / file)


def _is_whole(path: Path, size: int) -> bool:
    """Files appear under their names when they are whole."""
    return path.is_file() and path.stat().st_size == size


def _blocks(kvstore: ts.KvStore, file: str, size: int) -> Iterator[bytes]:
    """A file in order, several blocks of it under way at once."""
    under_way: collections.deque[concurrent.futures.Future[bytes]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
        for start in range(0, size, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size)
            under_way.append(pool.submit(folder.read_range, kvstore, file, start, stop))
            if len(under_way) == _AT_ONCE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
