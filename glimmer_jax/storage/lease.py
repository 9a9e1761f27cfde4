"""One writer at a time: a lease on a folder, kept in a small file that names its holder.

The file is created only where there is none (an atomic conditional write, on a disk as in a
bucket), rewritten every few seconds while it is held, and removed at the end. A killed holder
cannot remove it, so the next writer takes it over: at once if the holder was a process of this
machine and is dead, otherwise when the file has not changed for the lease time on the clock of the
waiting process. So no two clocks have to agree, and a host that returns under another name waits
for a bounded time. A restarted job also waits for the end of its earlier attempt, whose processes may
outlive a lost host for a while.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.storage.errors import storage_error
from glimmer_jax.storage.folder import (
    check_small,
    of_file,
    open_folder,
)

LEASE_SECONDS = 60.0
# How long a restarted job waits for the end of its earlier attempt: a process whose peers are gone ends
# within two minutes.
RESTART_SECONDS = 240.0
MAX_LEASE_SECONDS = 3600.0  # a longer one in a file is not ours
_RENEWALS = 6  # per lease
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_logger = logging.getLogger(__name__)
_command: str | None = None


def set_command(text: str | None) -> None:
    """Records the command that this process runs, without what differs between attempts of a job."""
    global _command
    _command = None if text is None else hashlib.sha256(text.encode()).hexdigest()


def command() -> str | None:
    """Checksum of this process's command; a restarted job has the same one. None if unknown."""
    return _command


class LockUnsupported(Exception):
    """The file system has no `flock`, as some network file systems."""


def try_lock(path: pathlib.Path) -> int | None:
    """Locks a local file or folder among the processes of this machine, until it is closed.

    Returns:
      The descriptor to close; None if another process holds the lock.

    Raises:
      LockUnsupported: the file system has no locks.
    """
    # Opening a pipe would block. NFS has exclusive locks for writers alone, and a folder has none.
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, access | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _NO_LOCKS:
            raise LockUnsupported(f"{path} cannot be locked: {error.strerror}") from error
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The holder that a lock file names."""

    pid: int
    host: str
    since: str
    machine: str | None  # boot and process namespace, see `_here`
    process_start: str | None
    lease_seconds: float
    about: Mapping[str, Any]
    ended: bool  # it left the file behind on purpose
    command: str | None  # see `command`

    @classmethod
    def parse(cls, data: bytes) -> "_Holder":
        """Raises ValueError for what this module did not write."""
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
        given: dict[str, Any] = {
            field.name: fields.get(field.name) for field in dataclasses.fields(cls)
        }
        given["lease_seconds"] = fields.get("lease_seconds", LEASE_SECONDS)
        given["about"] = fields.get("about", {})
        given["ended"] = fields.get("ended") is True
        holder = cls(**given)
        lease = holder.lease_seconds
        checks = {
            "pid": type(holder.pid) is int and 0 < holder.pid < 2**31,
            "host": isinstance(holder.host, str),
            "since": isinstance(holder.since, str),
            "machine": isinstance(holder.machine, str | None),
            "process_start": isinstance(holder.process_start, str | None),
            "lease_seconds": type(lease) in (int, float)
            and math.isfinite(lease)
            and 0 < lease <= MAX_LEASE_SECONDS,
            "about": isinstance(holder.about, dict),
            "command": isinstance(holder.command, str | None),
        }
        if wrong := [name for name, valid in checks.items() if not valid]:
            raise ValueError(", ".join(f"{name} is {fields.get(name)!r}" for name in wrong))
        return holder

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_of_this_command(self) -> bool:
        """Whether it is, or was, another attempt of the command that this process runs."""
        return self.command is not None and self.command == command()

    def is_dead(self) -> bool | None:
        """Whether the holder is dead; None if this cannot be known from here."""
        if self.ended:
            return True
        here = _here()
        if self.machine is None or (self.host, self.machine) != (here["host"], here["machine"]):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, start = _process_state(self.pid)
        # A killed process stays in the table as a zombie until its parent reads its exit code.
        if state in ("Z", "X"):
            return True
        return None not in (start, self.process_start) and start != self.process_start


class WriterLock:
    """Context manager that holds a folder for one writer.

    Raises:
      ValueError: on entry, if another writer holds it; its process and host are named.
      StopRequested: on entry, if an attempt of the same command on another host does not end.
    """

    def __init__(
        self,
        kvstore: ts.KvStore,
        name: str,
        lease_seconds: float = LEASE_SECONDS,
        about: Mapping[str, Any] | None = None,
        held: str | None = None,
    ):
        """Does not take the lock yet.

        Args:
          kvstore: of the folder.
          name: of the lock file in it.
          lease_seconds: how long the file may stay unchanged before its holder counts as dead.
          about: further facts about the holder, see `about`; JSON-able.
          held: what is locked, for messages; None is the folder.
        """
        self._held = held or kvstore.url
        self._kvstore = kvstore
        self._name = name
        self._where = f"{kvstore.url}{name}"
        self._lease = lease_seconds
        self._about = dict(about or {})
        self._own: dict[str, Any] = {}
        self._generation = b""
        self._lost = False
        self._abandoned = False
        self._renewed_at = 0.0
        self._writing = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> "WriterLock":
        generation = self._await_death()
        self._own = {
            **_here(),
            "pid": os.getpid(),
            "process_start": _process_state(os.getpid())[1],
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "lease_seconds": self._lease,
            "command": command(),
            "about": self._about,
            "beat": 0,
        }
        # Only if the file has not changed since it was read.
        written = self._write(if_equal=generation)
        if not written:
            raise ValueError(
                f"{self._where} was taken by another writer just now. One writer at a time: wait for "
                "it, or choose another folder."
            )
        self._generation, self._renewed_at = written, time.monotonic()
        self._thread = threading.Thread(target=self._keep_renewing, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._abandoned:
            self._own["ended"] = True
            with contextlib.suppress(ValueError, OSError):  # then it expires, as after a kill
                self._renew()
        elif not self._lost:
            try:
                self._kvstore.write(self._name, None, if_equal=self._generation).result()
            except ValueError as error:
                # The holder's work is done, or has an error of its own that says more.
                _logger.warning(
                    "%s could not be removed; it expires after %.0f s: %s",
                    self._where,
                    self._lease,
                    error,
                )

    def check(self) -> None:
        """Call it before writing anything that another writer could damage.

        Raises:
          ValueError: another writer took the lock over, because this process hung or could not
            reach the folder for longer than its lease.
        """
        if time.monotonic() - self._renewed_at > self._lease:
            self._renew()
        if self._lost:
            holder, problem = self._parse(self._read())
            raise ValueError(
                f"{self._where} was taken over by {holder or problem}: this process had not renewed it "
                f"for {self._lease:.0f} s. It writes nothing more."
            )

    def abandon(self) -> None:
        """Leaves the file behind on exit: the next writer takes it over and may read its `about`."""
        self._abandoned = True

    def about(self) -> dict[str, Any] | None:
        """The `about` of the lock's holder, alive or dead; None where there is no file."""
        result = self._read()
        if result.state == "missing":
            return None
        holder, _ = self._parse(result)
        return {} if holder is None else dict(holder.about)

    def about_earlier_attempt(self) -> dict[str, Any] | None:
        """`about`, if the holder is of the command that this process runs; None otherwise."""
        result = self._read()
        holder = None if result.state == "missing" else self._parse(result)[0]
        return dict(holder.about) if holder is not None and holder.is_of_this_command() else None

    def remove_if_dead(self) -> None:
        """Removes the file of a dead holder. Raises ValueError, as on entry, if it is alive."""
        generation = self._await_death()
        try:
            self._kvstore.write(self._name, None, if_equal=generation).result()
        except ValueError as error:
            raise storage_error(self._where, error) from error

    def _await_death(self) -> Any:
        """The generation of the file to replace. Raises ValueError if a living writer holds it."""
        result = self._read()
        if result.state == "missing":
            return result.stamp.generation
        holder, problem = self._parse(result)
        if holder is None:
            dead, lease = None, self._lease
            _logger.warning("%s is no lock file of ours (%s).", self._where, problem)
        else:
            dead, lease = holder.is_dead(), holder.lease_seconds
        own = holder is not None and holder.is_of_this_command()
        if dead is None:
            # On another machine, or unreadable: a living holder rewrites the file within its lease.
            wait = max(lease, RESTART_SECONDS) if own else lease
            _logger.warning(
                "%s is held by %s; waiting up to %.0f s for %s.",
                self._where,
                holder or "an unknown process",
                wait,
                "the end of that attempt" if own else "a sign of life",
            )
            changed = time.monotonic()
            end = changed + wait
            while dead is None:
                STOP.poll()
                time.sleep(min(1.0, lease / 20))
                seen, result, now = result.stamp.generation, self._read(), time.monotonic()
                if result.state == "missing":
                    return result.stamp.generation
                if result.stamp.generation != seen:
                    changed = now
                    dead = None if own else False
                elif now - changed >= lease:
                    dead = True
                if own and dead is None and now >= end:
                    raise StopRequested(
                        f"{self._held} is still being written by {holder}, an attempt of this command. "
                        "Stop it, or rerun later."
                    )
        if not dead:
            raise ValueError(
                f"{self._held} is being written by {holder or 'another process'}. One writer at a "
                "time: wait for it, stop it, or choose another path."
            )
        _logger.warning("%s is stale: %s is dead.", self._where, holder or "its holder")
        return result.stamp.generation

    @staticmethod
    def _parse(result: Any) -> tuple[_Holder | None, str]:
        """The holder, or None and the problem with the file."""
        try:
            return _Holder.parse(bytes(result.value)), ""
        except (ValueError, RecursionError) as error:
            return None, str(error)

    def _read(self) -> Any:
        check_small(self._kvstore, self._name)
        try:
            return self._kvstore.read(self._name).result()
        except ValueError as error:
            raise storage_error(self._where, error) from error

    def _write(self, if_equal: Any) -> bytes:
        """The new generation, or b"" where the file is not the one of generation `if_equal`."""
        data = (json.dumps(self._own, indent=1, sort_keys=True) + "\n").encode()
        try:
            written = self._kvstore.write(self._name, data, if_equal=if_equal).result().generation
        except ValueError as error:
            raise storage_error(self._where, error) from error
        if not written:
            # A bucket's answer may be lost and the write repeated, which then meets itself.
            result = self._read()
            if result.state == "value" and bytes(result.value) == data:
                return result.stamp.generation
        return written

    def _renew(self) -> None:
        with self._writing:
            if self._lost:
                return
            self._own["beat"] += 1
            written = self._write(if_equal=self._generation)
            if written:
                self._generation, self._renewed_at = written, time.monotonic()
            else:
                self._lost = True

    def _keep_renewing(self) -> None:
        while not self._lost and not self._stop.wait(self._lease / _RENEWALS):
            try:
                self._renew()
            except (ValueError, OSError) as error:
                # The next renewal may succeed; `check` looks at how long ago the last one did.
                _logger.warning("%s could not be renewed: %s", self._where, error)


def output_lock(
    path: str | os.PathLike, inside: bool = False, about: Mapping[str, Any] | None = None
) -> WriterLock:
    """The lock of an output: `.NAME.lock` beside it, or `.lock` inside a folder written in place."""
    text = os.fspath(path)
    if inside:
        return WriterLock(open_folder(text), ".lock", about=about, held=text)
    folder, name = of_file(text.rstrip("/"))
    return WriterLock(folder, f".{name}.lock", about=about, held=text)


def _here() -> dict[str, Any]:
    """Host, boot and process namespace, within which a process id has a meaning."""
    try:
        machine = f"{_boot()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = None
    return {"host": socket.gethostname(), "machine": machine}


def _boot() -> str:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_state(pid: int) -> tuple[str | None, str | None]:
    """The kernel's state letter of a process, and when it started: a pid used again starts later."""
    with contextlib.suppress(OSError):
        # A command's name may be any bytes.
        status = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = status.rpartition(")")[2].split()
        return fields[0], f"{_boot()} {fields[19]}"
    return None, None
