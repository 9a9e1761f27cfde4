"""Paths on a local disk, and those in a bucket."""

import os
from pathlib import Path
from typing import Any


def in_bucket(path: Any) -> bool:
    """Whether a path is a URL such as `gs://bucket/file`."""
    return "://" in os.fspath(path)


def local(name: str, path: Any) -> Path:
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
    return Path(text)
