"""Folders and buckets behind one small interface, TensorStore's key-value stores.

A store's path is a local folder, a TensorStore URL (`gs://bucket/memory/`, `file:///data/memory/`)
or a TensorStore key-value spec. Every file is written through the key-value store: on a local disk
that is a temporary file, fsync, rename, and fsync of the folder; in a bucket it is one atomic
object. So a file is there whole or not at all, wherever it lives.

Paths on a local disk, and those in a bucket.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

# TensorStore sets no limit to how long a bucket may keep it waiting. A request that brings less than a
# byte a second for this many seconds is given up by curl then, and made again by TensorStore.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

Path = str | os.PathLike | Mapping[str, Any]

# TensorStore raises ValueError for every status and puts its code first. These codes speak of the
# bytes that were found: a checksum, a chunk that is not there, a file cut short, nonsense in JSON.
_DAMAGE = re.compile(r"(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION): ")
# A web server's refusal says nothing of the bytes, except that there are none (404) or too few (416).
_REFUSED = re.compile(r"\[(HTTP code |http_response_code=')(?!404|416)\d+'?\]")


def open_folder(path: Path, context: ts.Context | None = None) -> ts.KvStore:
    """The key-value store at `path`; nothing is created before the first write."""
    if isinstance(path, Mapping):
        spec: Any = dict(path)
    else:
        text = os.fspath(path)
        if in_bucket(text):
            spec = text
        else:
            spec = {"driver": "file", "path": os.path.abspath(text)}
    kvstore = ts.KvStore.open(spec, context=context or ts.Context()).result()
    # The root of a bucket is the empty path.
    if kvstore.path and not kvstore.path.endswith("/"):
        kvstore.path += "/"
    return kvstore


def of_file(path: str | os.PathLike) -> tuple[ts.KvStore, str]:
    """The folder that a file lies in, and the file's name there."""
    parent, name = os.path.split(os.fspath(path))
    return open_folder(parent or "."), name


def subfolder(kvstore: ts.KvStore, name: str) -> ts.KvStore:
    """The folder `name` inside `kvstore`."""
    return kvstore / f"{name}/"


def read_file(kvstore: ts.KvStore, key: str) -> bytes | None:
    """The bytes of a file, or None where there is none.

    Raises:
      OSError: the storage did not answer, or refused.
    """
    try:
        result = kvstore.read(key).result()
    except ValueError as error:
        raise unreachable(f"{kvstore.url}{key}", error) from error
    return None if result.state == "missing" else bytes(result.value)


def read_if_new(
    kvstore: ts.KvStore, key: str, known: bytes | None
) -> tuple[bytes | None, bytes] | None:
    """A file's bytes and generation; no bytes where that is `known`; None where there is no file.

    Raises:
      OSError: the storage did not answer, or refused.
    """
    try:
        result = kvstore.read(key, if_not_equal=known).result()
    except ValueError as error:
        raise unreachable(f"{kvstore.url}{key}", error) from error
    if result.state == "missing":
        return None
    data = bytes(result.value) if result.state == "value" else None
    return data, result.stamp.generation


def read_range(kvstore: ts.KvStore, file: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before.

    Raises:
      OSError: the storage did not answer, or refused.
      ValueError: there is no such file.
    """
    for byte_range in (slice(start, stop), slice(start, None)):
        try:
            result = kvstore.read(file, byte_range=byte_range).result()
        except ValueError as error:
            if not is_damage(error):
                raise unreachable(f"{kvstore.url}{file}", error) from error
            continue  # The file ends within the range: what is left is less than was asked.
        if result.state == "missing":
            raise ValueError(f"{kvstore.url}{file} is missing. Fetch it again.")
        return bytes(result.value)
    return b""


def list_files(kvstore: ts.KvStore, prefix: str) -> list[str]:
    """Keys that begin with `prefix`, sorted. Raises OSError where the storage did not answer."""
    try:
        keys = kvstore.list(ts.KvStore.KeyRange(prefix, prefix + "\x7f")).result()
    except ValueError as error:
        raise unreachable(kvstore.url, error) from error
    return sorted(key.decode() for key in keys)


def write_file(kvstore: ts.KvStore, key: str, data: bytes) -> None:
    """Writes a file whole.

    Raises:
      OSError: the storage is full, did not answer, or refused.
    """
    try:
        kvstore.write(key, data).result()
    except ValueError as error:
        raise unreachable(f"{kvstore.url}{key}", error) from error


def is_damage(error: ValueError) -> bool:
    """Whether TensorStore's error is about wrong bytes, and not about reaching them."""
    text = str(error)
    return bool(_DAMAGE.match(text)) and not _REFUSED.search(text)


def unreachable(where: str, error: ValueError) -> OSError:
    """The error to raise where storage failed: the same command may well succeed later."""
    return OSError(
        f"{where} could not be read or written: {error}. That is the storage, not what is in it: check "
        "the connection, permissions and free space, and run the same command again."
    )


def dump_json(value: Any) -> bytes:
    """The one form in which we write JSON, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def in_bucket(path: Any) -> bool:
    """Whether a path is a URL such as `gs://bucket/file`."""
    return "://" in os.fspath(path)


def local(name: str, path: Any) -> pathlib.Path:
    """The path of what is written by libraries that know no buckets; `name` is what a user sets.

    Raises ValueError for a bucket's (`gs://...`).
    """
    text = os.fspath(path)
    if in_bucket(text):
        # pathlib would take it for a folder `gs:` here.
        raise ValueError(
            f"{name} is written to a local disk, got {text}. Give a local path, and copy what is "
            "written into the bucket (gcloud storage cp -r)."
        )
    return pathlib.Path(text)
