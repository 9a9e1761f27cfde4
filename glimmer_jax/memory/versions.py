"""Versions of a store: the newest in `manifest.json`, those before it in `versions/`.

A change keeps the manifest it replaces under its number and writes the new one last, in one piece.
A reader therefore sees the store before the change or after it, and can go back.
"""

import tensorstore as ts

from glimmer_jax.memory import folder
from glimmer_jax.memory.manifest import MANIFEST, Manifest


def _kept(version: int) -> str:
    return f"versions/{version:06d}.json"


def read_manifest(kvstore: ts.KvStore, version: int | None = None) -> Manifest:
    """The newest manifest, or that of an earlier version.

    Raises:
      ValueError: the store is not finished, has no such version, or has another format.
      DamagedStore: the manifest is damaged.
    """
    data = folder.read_file(kvstore, MANIFEST)
    if data is None:
        raise ValueError(
            f"No finished memory store at {kvstore.url}: it has no {MANIFEST}. If this is an "
            "unfinished build, run the same build_memory command again and it goes on where it "
            "stopped; otherwise check the path."
        )
    newest = Manifest.from_bytes(data, f"{kvstore.url}{MANIFEST}")
    if version is None or version == newest.version:
        return newest
    data = folder.read_file(kvstore, _kept(version))
    if data is None:
        raise ValueError(
            f"The memory store {kvstore.url} has no version {version}; its newest is "
            f"{newest.version}."
        )
    return Manifest.from_bytes(data, f"{kvstore.url}{_kept(version)}")


def replace_manifest(kvstore: ts.KvStore, old: Manifest, new: Manifest) -> None:
    """Makes `new` the store's newest version; the caller holds the store's lock."""
    assert new.version == old.version + 1
    folder.write_file(kvstore, _kept(old.version), old.to_bytes())
    folder.write_file(kvstore, MANIFEST, new.to_bytes())
