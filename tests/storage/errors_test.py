"""Errors are classified as temporary, invalid input, or bugs."""

import errno
import os

import pytest

from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import (
    StorageError,
    classify_error,
    describe_error,
    storage_error,
)


class UnavailableError(Exception):
    """Named as TensorFlow's."""


class ResourceExhaustedError(Exception):
    """Likewise."""


class NotFoundError(Exception):
    """Likewise."""


@pytest.mark.parametrize(
    "error, kind",
    [
        (OSError(errno.ETIMEDOUT, "timed out"), "temporary"),
        (OSError(errno.ESTALE, "stale"), "temporary"),
        (ConnectionResetError("by peer"), "temporary"),
        (UnavailableError("libcurl 6"), "temporary"),
        (ValueError("UNAVAILABLE: 503"), "temporary"),
        (ValueError("RESOURCE_EXHAUSTED: 429"), "temporary"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), "permanent"),
        (ResourceExhaustedError("OOM when allocating"), None),
        (ResourceExhaustedError("dev/x.jsonl; No space left on device"), "permanent"),
        (NotFoundError("cache/info.test.json"), "permanent"),
        (ValueError("UNAUTHENTICATED: token"), "permanent"),
        (OSError(errno.ENOSPC, "full"), "permanent"),
        (OSError(errno.ELOOP, "loop"), "permanent"),
        (OSError(errno.ENAMETOOLONG, "long"), "permanent"),
        (StorageError("INTERNAL: unknown"), "permanent"),
        (BrokenPipeError(errno.EPIPE, "pipe"), None),
        (OSError("without a number"), None),
        (ValueError("cannot reshape"), None),
        (KeyError("UNAVAILABLE: a key"), None),
    ],
)
def test_only_listed_errors_are_temporary(error, kind):
    assert classify_error(error) == kind
    outer = RuntimeError("the save failed")
    outer.__cause__ = error
    assert classify_error(outer) == kind


def loop(tmp_path):
    os.symlink(tmp_path / "b", tmp_path / "a")
    os.symlink(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a" / "x"


@pytest.mark.parametrize(
    "path",
    [loop, lambda tmp_path: tmp_path / ("n" * 300), lambda tmp_path: tmp_path / "file" / "x"],
)
@pytest.mark.parametrize("action", ["read", "write", "list"])
def test_a_path_that_cannot_exist_is_permanent(tmp_path, path, action):
    (tmp_path / "file").write_text("")
    kvstore = folder.open_folder(path(tmp_path))
    actions = {
        "read": lambda: folder.read_file(kvstore, "key"),
        "write": lambda: folder.write_file(kvstore, "key", b"1"),
        "list": lambda: folder.list_files(kvstore, ""),
    }
    if action == "read" and "file" in str(kvstore.path):
        return  # A file in place of a folder: there is nothing to read.
    with pytest.raises(OSError, match="could not be read or written") as caught:
        actions[action]()
    assert classify_error(caught.value) == "permanent"
    assert "Check the path" in describe_error(caught.value)


def test_a_storage_error_is_described_by_its_own_words():
    cause = ValueError("UNAVAILABLE: 503")
    error = storage_error("gs://b/m", cause)
    error.__cause__ = cause
    assert classify_error(error) == "temporary"
    assert describe_error(error) == str(error) and "gs://b/m" in str(error)
