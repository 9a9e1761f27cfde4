"""Paths of what is written to a local disk alone, by libraries that know no buckets."""

import os
from pathlib import Path
from typing import Any


def local(name: str, path: Any) -> Path:
    """The path; `name` is what a user sets. Raises ValueError for a bucket's (`gs://...`)."""
    text = os.fspath(path)
    if "://" in text:
        # pathlib would take it for a folder `gs:` here.
        raise ValueError(
            f"{name} is written to a local disk, got {text}. Give a local path, and copy what is "
            "written into the bucket (gcloud storage cp -r)."
        )
    return Path(text)
