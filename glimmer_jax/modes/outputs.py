"""Outputs of modes: free or replaceable, held by one writer, and kept if this command completed them.

A job that is killed after its output is complete, but before all its processes have ended, is started
again by the same command. The lock that the killed job left behind names the command and what was at
the output's place before, so that the second one ends at once instead of rejecting the file as somebody
else's. A command is its mode and its complete gin configuration.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from glimmer_jax.runtime import ending
from glimmer_jax.runtime.preemption import StopRequested
from glimmer_jax.storage import folder, lease
from glimmer_jax.storage.errors import classify_error
from glimmer_jax.weights import params_file

_FREE, _COMPLETE, _REJECTED, _UNREACHABLE = range(4)
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
        own, about = _earlier_attempt(self)
        if not (own and _has_changed(self, about)):
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
    """Holds an output, from before the work on it, so that a second command is rejected at once.

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
      StorageError: the storage did not answer, or denied access.
      StopRequested: in other processes, where process 0 could not reach the storage.
    """
    with contextlib.ExitStack() as stack:
        state, problem, lock = _FREE, None, None
        if jax.process_index() == 0:
            try:
                own, about = _earlier_attempt(place)
                lock = stack.enter_context(lease.output_lock(place.path, place.in_place, about))
                if own and _has_changed(place, about):
                    state = _COMPLETE
                    print(
                        f"{place.path} is complete and kept: a killed attempt of this command wrote it."
                    )
                else:
                    place.check()
            except (ValueError, OSError) as error:
                temporary = classify_error(error) == "temporary"
                state, problem = _UNREACHABLE if temporary else _REJECTED, error
        if jax.process_count() > 1:
            # One process decides: it may have written the output before another looks.
            state = int(multihost_utils.broadcast_one_to_all(np.array(state)))
        if problem is not None:
            raise problem
        if state == _REJECTED:
            raise ValueError(f"{place.path} was rejected by process 0, which reports the reason.")
        if state == _UNREACHABLE:
            raise StopRequested(f"Process 0 could not reach {place.path}.")
        try:
            yield Held(state == _COMPLETE, (lambda: None) if lock is None else lock.check)
        except BaseException:
            if lock is not None and _may_have_changed(place, about):
                lock.abandon()
            raise
        # A restart must recognise the output as long as any process of the job may fail.
        ending.before_end(stack.pop_all().close)


def _earlier_attempt(place: Place) -> tuple[bool, dict[str, Any]]:
    """Whether an attempt of this command left its lock behind; `about` of the next lock."""
    left = lease.output_lock(place.path, place.in_place).about_earlier_attempt()
    before = _identity(place.last) if left is None else left.get("before")
    return left is not None, {"before": before}


def _has_changed(place: Place, about: Mapping[str, Any]) -> bool:
    """Whether the output is complete, and is not the one that was there before."""
    return _identity(place.last) not in (None, about["before"])


def _may_have_changed(place: Place, about: Mapping[str, Any]) -> bool:
    """`_has_changed`, or True if the storage does not answer."""
    try:
        return _has_changed(place, about)
    except (ValueError, OSError):
        return True


def _identity(path: str) -> str | None:
    """Changes when the file is replaced; None if it is missing. Raises StorageError."""
    if folder.in_bucket(path):
        found = folder.read_if_new(*folder.of_file(path), known=None)
        return None if found is None else found[1].hex()
    try:
        status = os.stat(folder.local_path(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    # No inode number: some network file systems number files anew on each machine.
    return f"{status.st_size} {status.st_mtime_ns}"


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
