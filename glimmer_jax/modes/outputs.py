"""Outputs of modes: free or replaceable, held by one writer, and kept if this command completed them.

A job that is killed after its output is complete, but before all its processes have ended, is started
again by the same command. The lock that the killed job left behind names the command and what was at
the output's place before, so that the second one ends at once instead of rejecting the file as somebody
else's.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from glimmer_jax.storage import folder, lease
from glimmer_jax.weights import params_file

_FREE, _COMPLETE, _REJECTED = range(3)
# Where and how results are written, not what they are.
_PLACES = ("MODEL_DIR", "EVAL_OUTPUT_DIR", "OVERWRITE")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a mode writes, and how to know whether something is there."""

    path: str  # of a file or folder
    last: str  # the file that completes the output
    # Raises ValueError if something is there that may not be replaced.
    check: Callable[[], None]
    in_place: bool = (
        False  # a folder whose files are written one by one, and not renamed into place
    )

    def check_early(self) -> None:
        """`check`, unless this command itself completed the output; before anything is read."""
        if not _earlier_attempt(self)[0]:
            self.check()


@dataclasses.dataclass(frozen=True)
class Held:
    """An output that this process may write."""

    complete: bool  # an earlier attempt of this command has written it: there is nothing to do
    # Call it before writing; raises ValueError if another process took the lock over.
    check_lock: Callable[[], None]


def replaceable(name: str, path: str, overwrite: bool) -> None:
    """Raises ValueError for an output file that exists, unless it may be replaced."""
    kvstore, key = folder.of_file(path)
    parent = Path(path).parent
    if not folder.in_bucket(path) and parent.exists() and not parent.is_dir():
        raise ValueError(f"{name}: {parent} is a file. Choose a folder.")
    if not overwrite and folder.exists(kvstore, key):
        raise ValueError(
            f"{name}: {path} exists. Set OVERWRITE=True to replace it, or write to another folder."
        )


def params_file_place(path: str, overwrite: bool) -> Place:
    """The place of a parameter file. Raises ValueError for a path that is no `NAME.safetensors`."""
    described = str(params_file.check_name(path).with_suffix(".json"))  # It completes the pair.
    return Place(path, described, lambda: replaceable("OUTPUT_PATH", described, overwrite))


@contextlib.contextmanager
def locked(path: str | None, in_place: bool = False) -> Iterator[Callable[[], None]]:
    """Holds an output, from before the work on it: of two commands that write it, one is rejected.

    Only process 0 writes, so it alone holds the lock.

    Args:
      path: of a file or folder; None is no output.
      in_place: see `Place`.

    Yields:
      A function to call before writing; it raises ValueError if another process took the lock over.

    Raises:
      ValueError: another process is writing it.
    """
    if path is None or jax.process_index():
        yield lambda: None
        return
    with lease.output_lock(path, inside=in_place) as lock:
        yield lock.check


@contextlib.contextmanager
def sole_writer(place: Place) -> Iterator[Held]:
    """Holds an output as `locked` does, if it is free or may be replaced; in all processes.

    Raises:
      ValueError: another process is writing it, or another command has written it.
    """
    with contextlib.ExitStack() as stack:
        state, problem, lock, before = _FREE, None, None, None
        if jax.process_index() == 0:
            try:
                complete, about = _earlier_attempt(place)
                before = about["before"]
                lock = stack.enter_context(lease.output_lock(place.path, place.in_place, about))
                if complete:
                    state = _COMPLETE
                    print(f"{place.path} is complete and kept: this command wrote it before.")
                else:
                    place.check()
            except ValueError as error:
                state, problem = _REJECTED, error
        if jax.process_count() > 1:
            # One process decides: it may have written the output before another looks.
            state = int(multihost_utils.broadcast_one_to_all(np.array(state)))
        if problem is not None:
            raise problem
        if state == _REJECTED:
            raise ValueError(f"{place.path} was rejected by process 0, which reports the reason.")
        try:
            yield Held(state == _COMPLETE, (lambda: None) if lock is None else lock.check)
            if jax.process_count() > 1:
                # Until all have come so far, a restart of the job must know the output as its own.
                multihost_utils.sync_global_devices(f"written: {place.path}")
        except BaseException:
            if lock is not None and _identity(place.last) not in (None, before):
                lock.abandon()
            raise


def _earlier_attempt(place: Place) -> tuple[bool, dict[str, Any]]:
    """Whether an earlier attempt of this command completed the output; `about` of the next lock."""
    now = _identity(place.last)
    left = lease.output_lock(place.path, place.in_place).about() or {}
    own = left.get("command") == lease.command()
    before = left.get("before") if own else now
    return now not in (None, before), {"command": lease.command(), "before": before}


def _identity(path: str) -> str | None:
    """Another one if a file was replaced; None without a file."""
    if folder.in_bucket(path):
        kvstore, key = folder.of_file(path)
        result = kvstore.read(key).result()
        return None if result.state == "missing" else result.stamp.generation.hex()
    try:
        found = os.stat(folder.local_path(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def changed_settings(output_dir: str, config_text: str) -> list[str]:
    """Bindings in which an operative configuration differs from `config.gin` of `output_dir`.

    Args:
      output_dir: local or in a bucket; without the file nothing differs.
      config_text: the operative configuration now; empty without gin.

    Returns:
      Texts such as `LEARNING_RATE: 0.001 -> 0.0002`, sorted.
    """
    saved = folder.read_file(folder.open_folder(output_dir), "config.gin")
    if saved is None or not config_text:
        return []
    old, new = _bindings(saved.decode(errors="replace")), _bindings(config_text)
    return [
        f"{name}: {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _PLACES
    ]


def _bindings(config_text: str) -> dict[str, str]:
    """Name -> value of each binding; gin continues a long value on indented lines."""
    whole = re.sub(r"\\?\n[ \t]+", " ", config_text)
    lines = (line.partition(" = ") for line in whole.splitlines() if not line.startswith("#"))
    return {name: value.strip() for name, equals, value in lines if equals}
