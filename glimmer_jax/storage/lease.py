"""One writer at a time: a lease on a folder, kept in a small file that says who holds it.

The file is created only where there is none (an atomic conditional write, on a disk as in a
bucket), rewritten every few seconds while it is held, and removed at the end. A holder that was
killed cannot remove it, and the next writer takes it over: at once if the holder was a process of
this machine and is dead, otherwise when the file has not been rewritten for a whole lease by the
clock of the one who waits. So no two clocks have to agree, and a host that comes back under another
name waits for a bounded time only.
"""

import json
import logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

LEASE_SECONDS = 60.0
_BEATS = 6  # rewritings a lease
_logger = logging.getLogger(__name__)


class WriterLock:
    """Context manager that holds a folder for one writer.

    Raises:
      ValueError: on entry, if another writer holds it; its process and host are named.
    """

    def __init__(
        self,
        kvstore: ts.KvStore,
        name: str,
        lease_seconds: float = LEASE_SECONDS,
        about: Mapping[str, Any] | None = None,
    ):
        """Does not take the lock yet.

        Args:
          kvstore: of the folder.
          name: of the lock's file in it.
          lease_seconds: how long the file may stay untouched before its holder counts as dead.
          about: what else the file says of its holder, see `about`; JSON.
        """
        self._kvstore = kvstore
        self._name = name
        self._lease = lease_seconds
        self._about = dict(about or {})
        self._me: dict[str, Any] = {}
        self._generation = b""
        self._lost = False
        self._last_beat = 0.0
        self._writing = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> "WriterLock":
        generation = self._wait_for_the_dead()
        self._me = {
            **_place(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "lease_seconds": self._lease,
            "about": self._about,
            "beat": 0,
        }
        # Only if nothing has happened to the file since we looked at it.
        written = self._write(if_equal=generation)
        if not written:
            raise ValueError(
                f"Another writer took {self._name} of {self._kvstore.url} just now. One writer at a "
                "time: wait for it, or choose another folder."
            )
        self._generation, self._last_beat = written, time.monotonic()
        self._thread = threading.Thread(target=self._keep_beating, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            try:
                self._kvstore.write(self._name, None, if_equal=self._generation).result()
            except ValueError as error:
                # What the holder did is done, or has an error of its own that says more.
                _logger.warning(
                    "%s of %s could not be removed, and ends by itself after %.0f s: %s",
                    self._name,
                    self._kvstore.url,
                    self._lease,
                    error,
                )

    def check(self) -> None:
        """To be asked before anything is written that another writer could spoil.

        Raises:
          ValueError: another writer has taken the lock over, because this process stood still (or
            could not reach the folder) for longer than its lease.
        """
        if time.monotonic() - self._last_beat > self._lease:
            self._beat()
        if self._lost:
            who = _describe(self._read())[1]
            raise ValueError(
                f"{self._name} of {self._kvstore.url} was taken over by {who}: this process had not "
                f"renewed it for {self._lease:.0f} s. Nothing more is written from here."
            )

    def about(self) -> dict[str, Any] | None:
        """What the lock's file says of its holder, living or dead; None where there is no file."""
        found = self._read()
        return None if found.state == "missing" else _describe(found)[0].get("about", {})

    def remove_if_dead(self) -> None:
        """Leaves no file of a dead holder. Raises ValueError, as on entry, where it is alive."""
        generation = self._wait_for_the_dead()
        try:
            self._kvstore.write(self._name, None, if_equal=generation).result()
        except ValueError as error:
            raise self._unreachable(error) from error

    def _wait_for_the_dead(self) -> Any:
        """The generation to replace; raises if a living writer holds the lock."""
        found = self._read()
        if found.state == "missing":
            return found.stamp.generation
        holder, who = _describe(found)
        dead = _is_dead(holder)
        if dead is None:
            # Elsewhere, or unreadable: a living holder rewrites the file before its lease ends.
            lease = float(holder.get("lease_seconds", self._lease))
            _logger.warning(
                "%s holds %s of %s; waiting up to %.0f s for a sign of life.",
                who,
                self._name,
                self._kvstore.url,
                lease,
            )
            first, end = found.stamp.generation, time.monotonic() + lease
            while found.stamp.generation == first and time.monotonic() < end:
                time.sleep(min(1.0, lease / 20))
                found = self._read()
                if found.state == "missing":
                    return found.stamp.generation
            dead = found.stamp.generation == first
        if not dead:
            raise ValueError(
                f"{self._kvstore.url} is being written by {who}. One writer at a time: wait for it, "
                "stop it, or choose another folder."
            )
        _logger.warning("%s is dead; its %s counts no longer.", who, self._name)
        return found.stamp.generation

    def _read(self) -> Any:
        try:
            return self._kvstore.read(self._name).result()
        except ValueError as error:
            raise self._unreachable(error) from error

    def _write(self, if_equal: Any) -> bytes:
        """The new generation, or b"" where the file is not the one of generation `if_equal`."""
        data = (json.dumps(self._me, indent=1, sort_keys=True) + "\n").encode()
        try:
            written = self._kvstore.write(self._name, data, if_equal=if_equal).result().generation
        except ValueError as error:
            raise self._unreachable(error) from error
        if not written:
            # A bucket's answer may be lost and the write repeated, which then meets itself.
            found = self._read()
            if found.state == "value" and bytes(found.value) == data:
                return found.stamp.generation
        return written

    def _unreachable(self, error: ValueError) -> OSError:
        return OSError(
            f"{self._name} of {self._kvstore.url} could not be read or written: {error}. Check the "
            "connection, permissions and free space, and run the same command again."
        )

    def _beat(self) -> None:
        with self._writing:
            if self._lost:
                return
            self._me["beat"] += 1
            written = self._write(if_equal=self._generation)
            if written:
                self._generation, self._last_beat = written, time.monotonic()
            else:
                self._lost = True

    def _keep_beating(self) -> None:
        while not self._lost and not self._stop.wait(self._lease / _BEATS):
            try:
                self._beat()
            except (ValueError, OSError) as error:
                # TensorStore's errors of a disk or a bucket: the next beat may succeed, and
                # `check` looks at how long ago the last one did.
                _logger.warning("%s could not be renewed: %s", self._name, error)


def _place() -> dict[str, Any]:
    """Where process ids mean something: host, boot, and space of process ids."""
    try:
        machine = f"{_boot()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = None
    return {"host": socket.gethostname(), "machine": machine}


def _boot() -> str:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _process_start(pid: int) -> str | None:
    """When the process began, by the kernel's count; a pid used again has another start."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return f"{_boot()} {stat.rpartition(')')[2].split()[19]}"
    except OSError:
        return None


def _describe(found: Any) -> tuple[dict[str, Any], str]:
    """The holder in a lock's file, and in words."""
    try:
        holder = json.loads(bytes(found.value))
        return holder, f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return {}, "an unreadable lock file"


def _is_dead(holder: dict[str, Any]) -> bool | None:
    """Whether the holder is dead; None if that cannot be told from here."""
    here = _place()
    if not holder or any(holder.get(key) != here[key] for key in here):
        return None
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    start = _process_start(holder["pid"])
    return None not in (start, holder["process_start"]) and start != holder["process_start"]
