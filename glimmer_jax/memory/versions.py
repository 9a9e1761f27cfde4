"""Versions of a store: the newest in `manifest.json`, those before it in `versions/`.

A change keeps the manifest it replaces under its number and writes the new one last, in one piece.
A reader therefore sees the store before the change or after it, and can go back.
"""

import tensorstore as ts

from glimmer_jax.memory.manifest import MANIFEST, DamagedStore, Manifest
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock


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
    # An earlier one first: it can be read where the newest is damaged.
    if version is not None:
        kept = folder.read_file(kvstore, _kept(version))
        if kept is not None:
            return Manifest.from_bytes(kept, f"{kvstore.url}{_kept(version)}")
    try:
        newest = Manifest.from_bytes(data, f"{kvstore.url}{MANIFEST}")
    except DamagedStore as damage:
        check_unchanged(kvstore, damage)
        raise
    if version is None or version == newest.version:
        return newest
    raise ValueError(
        f"The memory store {kvstore.url} has no version {version}; its newest is {newest.version}."
    )


def check_unchanged(kvstore: ts.KvStore, damage: DamagedStore | None) -> None:
    """Returns where the build may write the manifest anew, since it alone has made the store.

    Args:
      damage: of the manifest; None where it is missing.

    Raises DamagedStore where earlier manifests are kept, with the newest version that is whole: to build
    again would bring back what was withdrawn since, and lose what was appended.
    """
    state = "missing" if damage is None else "damaged"
    kept = folder.list_files(kvstore, "versions/")
    for name in reversed(kept):
        data = folder.read_file(kvstore, name)
        assert data is not None
        try:
            whole = Manifest.from_bytes(data, f"{kvstore.url}{name}")
        except DamagedStore:
            continue
        raise DamagedStore(
            f"{kvstore.url}{MANIFEST} is {state}, and the store was merged, or changed since it was "
            f"built. Version {whole.version} is whole: read it with VERSION = {whole.version}, or go "
            f"back to it by copying {name} over {MANIFEST}, and make changes that came later again "
            "with --run_mode=memory."
        ) from damage
    if kept:
        raise DamagedStore(
            f"{kvstore.url}{MANIFEST} is {state}, and every earlier one in versions/ is damaged. Put one "
            "of them back from a copy, or build into another folder."
        ) from damage


def keep_manifest(kvstore: ts.KvStore, found: Manifest) -> None:
    """Keeps a copy of a manifest under its number: a build does not make such a store anew."""
    folder.write_file(kvstore, _kept(found.version), found.to_bytes())


def replace_manifest(kvstore: ts.KvStore, old: Manifest, new: Manifest, lock: WriterLock) -> None:
    """Makes `new` the store's newest version.

    Raises ValueError where the store's lock is lost; nothing is written then.
    """
    assert new.version == old.version + 1
    lock.check()
    keep_manifest(kvstore, old)
    folder.write_file(kvstore, MANIFEST, new.to_bytes())
