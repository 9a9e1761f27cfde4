"""Files in local folders and in buckets behind one small interface, TensorStore's key-value stores.

A folder's path is a local path, a URL (`gs://bucket/memory/`, `file:///data/memory/`) or a TensorStore
key-value spec. Every file is written atomically: on a local disk as a temporary file, with fsync and
rename, in a bucket as one object. A file is complete or absent, wherever it lives.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import tensorstore as ts

from glimmer_jax.storage.errors import StorageError, storage_error

# TensorStore waits for a bucket without limit. With these settings curl gives up a request that receives
# less than a byte per second for this many seconds, and TensorStore repeats it.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

Path = str | os.PathLike | Mapping[str, Any]
# Metadata and other files without a known size are smaller.
MAX_WHOLE_BYTES = 2**30

# TensorStore raises ValueError for every status and puts its code first. These codes concern the bytes:
# a wrong checksum, a missing chunk, a truncated file, invalid JSON.
_DAMAGE = re.compile(r"(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION): ")
# A web server's error says nothing about the bytes, except that there are none (404) or too few (416).
_REFUSED = re.compile(r"\[(HTTP code |http_response_code=')(?!404|416)\d+'?\]")


def open_folder(path: Path, context: ts.Context | None = None) -> ts.KvStore:
    """The key-value store at `path`; nothing is created before the first write.

    Raises:
      ValueError: TensorStore does not accept the path.
    """
    if isinstance(path, Mapping):
        spec: Any = dict(path)
    else:
        text = local_path(path)
        spec = text if in_bucket(text) else {"driver": "file", "path": os.path.abspath(text)}
    try:
        kvstore = ts.KvStore.open(spec, context=context or ts.Context()).result()
    except (ValueError, RuntimeError) as error:  # RuntimeError: the name is not UTF-8.
        raise ValueError(
            f"{path} is not a path that can be opened: {error}. Give a local path or a URL such as "
            "gs://BUCKET/FOLDER."
        ) from None
    # The root of a bucket is the empty path.
    if kvstore.path and not kvstore.path.endswith("/"):
        kvstore.path += "/"
    return kvstore


def make_folder(path: str | os.PathLike) -> None:
    """Creates a local folder; buckets have none. Raises OSError where it cannot be created."""
    text = local_path(path)
    if not in_bucket(text):
        os.makedirs(text, exist_ok=True)


def of_file(path: str | os.PathLike) -> tuple[ts.KvStore, str]:
    """The folder that contains a file, and the file's name in it."""
    text = local_path(path)
    parent, name = os.path.split(text if in_bucket(text) else os.path.abspath(text))
    return open_folder(parent), name


def subfolder(kvstore: ts.KvStore, name: str) -> ts.KvStore:
    """The folder `name` inside `kvstore`."""
    return kvstore / f"{name}/"


def reject_special_files(kvstore: ts.KvStore, key: str = "") -> None:
    """Raises StorageError for a pipe, socket or device on a local disk, whose reading may block forever.

    Args:
      kvstore: a folder, local or in a bucket.
      key: a file in it; by default all of them, in its subfolders too.
    """
    if not kvstore.url.startswith("file://"):
        return
    paths = [kvstore.path + key]
    if not key:
        paths = [f"{place}/{name}" for place, _, names in os.walk(kvstore.path) for name in names]
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # The reader reports it.
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise StorageError(
                f"{path} is a pipe, a socket or a device, expected a file. Copy the folder again."
            )


def check_small(kvstore: ts.KvStore, key: str) -> None:
    """Raises StorageError for a local file that cannot be read at once.

    That is one that `reject_special_files` rejects, or one of more than `MAX_WHOLE_BYTES`, for which
    TensorStore would end the process where there is too little memory.
    """
    reject_special_files(kvstore, key)
    size = local_size(kvstore, key)
    if size is not None and size > MAX_WHOLE_BYTES:
        raise StorageError(
            f"{kvstore.path}{key} has {size} bytes, expected at most {MAX_WHOLE_BYTES}: it is damaged, "
            "or is another file. Copy it again."
        )


def local_size(kvstore: ts.KvStore, key: str) -> int | None:
    """Bytes of a file on a local disk; None in a bucket, or without a file."""
    if not kvstore.url.startswith("file://"):
        return None
    try:
        return os.stat(kvstore.path + key).st_size
    except OSError:
        return None


def read_file(kvstore: ts.KvStore, key: str, size: int | None = None) -> bytes | None:
    """The bytes of a file, or None where there is none.

    Args:
      kvstore: its folder, local or in a bucket.
      key: its name.
      size: its bytes, if they are known; a local file of another size is not read, and None. Files of
        unknown size are small (`check_small`).

    Raises:
      StorageError: the storage did not answer, denied access, or has no regular file there, or a large
        one of unknown size.
    """
    if size is None:
        check_small(kvstore, key)
    else:
        reject_special_files(kvstore, key)
        if local_size(kvstore, key) not in (None, size):
            return None
    try:
        result = kvstore.read(key).result()
    except ValueError as error:
        raise storage_error(f"{kvstore.url}{key}", error) from error
    return None if result.state == "missing" else bytes(result.value)


def read_if_new(
    kvstore: ts.KvStore, key: str, known: bytes | None
) -> tuple[bytes | None, bytes] | None:
    """A file's bytes and generation; no bytes if the generation is `known`; None without a file.

    Raises:
      StorageError: the storage did not answer, or denied access.
    """
    reject_special_files(kvstore, key)
    try:
        result = kvstore.read(key, if_not_equal=known).result()
    except ValueError as error:
        raise storage_error(f"{kvstore.url}{key}", error) from error
    if result.state == "missing":
        return None
    data = bytes(result.value) if result.state == "value" else None
    return data, result.stamp.generation


def read_range(kvstore: ts.KvStore, file: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer if it ends earlier.

    Raises:
      StorageError: the storage did not answer, or denied access.
      ValueError: there is no such file.
    """
    reject_special_files(kvstore, file)
    for byte_range in (slice(start, stop), slice(start, None)):
        try:
            result = kvstore.read(file, byte_range=byte_range).result()
        except ValueError as error:
            if not is_damage(error):
                raise storage_error(f"{kvstore.url}{file}", error) from error
            continue  # The file ends within the range.
        if result.state == "missing":
            raise ValueError(f"{kvstore.url}{file} is missing. Fetch it again.")
        return bytes(result.value)
    return b""


def list_files(kvstore: ts.KvStore, prefix: str) -> list[str]:
    """Keys that begin with `prefix`, sorted. Raises StorageError."""
    try:
        keys = kvstore.list(_beginning_with(prefix)).result()
    except ValueError as error:
        raise storage_error(kvstore.url, error) from error
    return sorted(os.fsdecode(key) for key in keys)


def _beginning_with(prefix: str) -> ts.KvStore.KeyRange:
    start = os.fsencode(prefix)
    # No character begins with this byte in UTF-8.
    return ts.KvStore.KeyRange(start, start + b"\xff")


def exists(kvstore: ts.KvStore, key: str) -> bool:
    """Whether a folder has a file of this name. Raises StorageError."""
    try:
        return bool(kvstore.list(ts.KvStore.KeyRange(key, f"{key}\0")).result())
    except ValueError as error:
        raise storage_error(f"{kvstore.url}{key}", error) from error


def write_file(kvstore: ts.KvStore, key: str, data: bytes) -> None:
    """Writes a file atomically.

    Raises:
      StorageError: the storage is full, unreachable, or denies access.
    """
    try:
        kvstore.write(key, data).result()
    except ValueError as error:
        raise storage_error(f"{kvstore.url}{key}", error) from error


def remove_file(kvstore: ts.KvStore, key: str) -> None:
    """Removes a file, if there is one. Raises StorageError."""
    try:
        kvstore.write(key, None).result()
    except ValueError as error:
        raise storage_error(f"{kvstore.url}{key}", error) from error


@contextlib.contextmanager
def writing(
    path: str | os.PathLike,
    private: bool = False,
    before: Callable[[pathlib.Path], None] | None = None,
) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when the context ends, and never after an error.

    For files that do not fit `write_file`. The bytes go through a local disk.

    Args:
      path: local, in folders that are created if missing, or a URL.
      private: readable by the owner alone; on a local disk only.
      before: called with the complete file on a local disk, before it appears.
    """
    kvstore, name = of_file(path)
    text = local_path(path)
    target = None if in_bucket(text) else pathlib.Path(text).absolute()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    folder = None if target is None else target.parent
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(pathlib.Path(temporary))
        if target is None:
            write_file(kvstore, name, pathlib.Path(temporary).read_bytes())
            return
        # Files of mkstemp are private; data files follow the umask.
        if not private:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: pathlib.Path) -> None:
    """Returns when a local file's bytes, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_damage(error: ValueError) -> bool:
    """Whether TensorStore's error concerns the bytes, and not access to them."""
    text = str(error)
    return bool(_DAMAGE.match(text)) and not _REFUSED.search(text)


def dump_json(value: Any) -> bytes:
    """JSON in one form, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def local_path(path: str | os.PathLike) -> str:
    """`file:///data/x` as `/data/x`; other paths and URLs unchanged.

    Raises:
      ValueError: a `file:` URL with a host or without slashes.
    """
    text = os.fspath(path)
    if not text.startswith("file:"):
        return text
    if not text.startswith("file:///"):
        raise ValueError(
            f"{text} must begin with file:/// and an absolute path. Give a local path."
        )
    return text.removeprefix("file://")


def in_bucket(path: Any) -> bool:
    """Whether a path is a URL such as `gs://bucket/file`."""
    return "://" in os.fspath(path)


def local(name: str, path: Any) -> pathlib.Path:
    """The path of what libraries write that know no buckets; `name` is the setting, for messages.

    Raises:
      ValueError: the path is in a bucket.
    """
    text = local_path(path)
    if in_bucket(text):
        # pathlib would take it for a local folder `gs:`.
        raise ValueError(
            f"{name} is written to a local disk, got {text}. Give a local path, and copy it into the "
            "bucket afterwards (gcloud storage cp -r)."
        )
    return pathlib.Path(text)
