"""Versions of a store: the newest manifest is `manifest.json`, earlier ones are in `versions/`.

A change first copies the manifest that it replaces to `versions/`, and writes the new one last, in one
atomic write. Readers see the store either before or after the change, and can open earlier versions.
"""

import tensorstore as ts

from glimmer_jax.memory.manifest import MANIFEST, DamagedStore, Manifest
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock


def _version_file(version: int) -> str:
    return f"versions/{version:06d}.json"


def is_finished(kvstore: ts.KvStore) -> bool:
    """Whether there is a manifest, intact or not. Raises OSError."""
    return folder.read_file(kvstore, MANIFEST) is not None


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
            "unfinished build, rerun the same build_memory command to resume it; otherwise check "
            "the path."
        )
    # The earlier version first: it can be read even if the newest manifest is damaged.
    if version is not None:
        earlier = folder.read_file(kvstore, _version_file(version))
        if earlier is not None:
            where = f"{kvstore.url}{_version_file(version)}"
            manifest = Manifest.from_bytes(earlier, where)
            if manifest.version != version:
                raise DamagedStore(
                    f"{where} is damaged: it holds version {manifest.version}. Copy it again."
                )
            return manifest
    try:
        newest = Manifest.from_bytes(data, f"{kvstore.url}{MANIFEST}")
    except DamagedStore as damage:
        check_rebuildable(kvstore, damage)
        raise
    if version is None or version == newest.version:
        return newest
    raise ValueError(
        f"VERSION {version} does not exist in the memory store {kvstore.url}; its newest version is "
        f"{newest.version}."
    )


def check_rebuildable(kvstore: ts.KvStore, damage: DamagedStore | None) -> None:
    """Returns if a build may write a missing or damaged manifest: the build alone made the store.

    Args:
      damage: of the manifest; None if it is missing.

    Raises:
      DamagedStore: earlier manifests exist. A rebuilt manifest would restore what was withdrawn and
        lose what was appended since the build. The newest intact version is named.
    """
    state = "missing" if damage is None else "damaged"
    earlier = folder.list_files(kvstore, "versions/")
    for name in reversed(earlier):
        data = folder.read_file(kvstore, name)
        assert data is not None
        try:
            intact = Manifest.from_bytes(data, f"{kvstore.url}{name}")
        except DamagedStore:
            continue
        raise DamagedStore(
            f"{kvstore.url}{MANIFEST} is {state}, and the store was merged, or changed since it was "
            f"built. Version {intact.version} is intact: read it with VERSION = {intact.version}, or "
            f"restore it by copying {name} over {MANIFEST} and repeat later changes with "
            "--run_mode=memory."
        ) from damage
    if earlier:
        raise DamagedStore(
            f"{kvstore.url}{MANIFEST} is {state}, and every earlier manifest in versions/ is damaged. "
            "Restore one of them from a copy, or build into another folder."
        ) from damage


def keep_manifest(kvstore: ts.KvStore, current: Manifest) -> None:
    """Copies a manifest to `versions/`; from then on a build no longer rewrites it."""
    folder.write_file(kvstore, _version_file(current.version), current.to_bytes())


def replace_manifest(kvstore: ts.KvStore, old: Manifest, new: Manifest, lock: WriterLock) -> None:
    """Makes `new` the newest version of the store.

    Raises ValueError if the store's lock is lost; nothing is written then.
    """
    assert new.version == old.version + 1
    lock.check()
    keep_manifest(kvstore, old)
    folder.write_file(kvstore, MANIFEST, new.to_bytes())
