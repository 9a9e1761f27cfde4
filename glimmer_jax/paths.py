"""Paths of what is read from a local disk alone, by memory maps and libraries without buckets."""

import os
from pathlib import Path
from typing import Any


def local(name: str, path: Any) -> Path:
    """The path; `name` is what a user sets. Raises ValueError for a bucket's (`gs://...`)."""
    text = os.fspath(path)
    if "://" in text:
        # pathlib would take it for a folder `gs:` here.
        raise ValueError(
            f"{name} is read from and written to a local disk, got {text}. Copy it to every machine "
            "first (gcloud storage cp -r), or from here afterwards, and give the local path."
        )
    return Path(text)
