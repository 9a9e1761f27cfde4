"""One writer at a time: a lock file that says who holds it.

Created only where there is none (an atomic conditional write, on a disk as in a bucket), removed at
the end. A lock left by a process of this machine that is dead is taken over; one left on another
machine cannot be judged from here and is refused with its holder named.
"""

import json
import os
import pathlib
import socket
import time
from typing import Any

import tensorstore as ts

from glimmer_jax.memory import folder

LOCK = "build.lock"


def _process_start(pid: int) -> str | None:
    """When the process began, by the kernel's count; a pid used again has another start."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"


def _alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    start = _process_start(holder["pid"])
    return start is None or holder["process_start"] is None or start == holder["process_start"]


class BuildLock:
    """Context manager that holds the lock of a store.

    Raises:
      ValueError: on entry, if another writer holds it.
    """

    def __init__(self, kvstore: ts.KvStore):
        self._kvstore = kvstore
        self._generation = b""

    def __enter__(self) -> "BuildLock":
        found = self._kvstore.read(LOCK).result()
        if found.state != "missing":
            self._refuse_unless_stale(bytes(found.value))
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        # Only if nothing has happened to the file since we looked at it.
        write = self._kvstore.write(
            LOCK, folder.dump_json(me), if_equal=found.stamp.generation
        ).result()
        if not write.generation:
            raise ValueError(
                f"Another writer took the lock of {self._kvstore.url} just now. One build at a "
                "time may write a memory store."
            )
        self._generation = write.generation
        return self

    def _refuse_unless_stale(self, data: bytes) -> None:
        try:
            holder = json.loads(data)
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
            dead = holder["host"] == socket.gethostname() and not _alive(holder)
        except (ValueError, KeyError, TypeError):
            who, dead = "an unreadable lock file", False
        if not dead:
            raise ValueError(
                f"{self._kvstore.url} is being written by {who}. One build at a time may write a "
                f"memory store: wait for it, or if it is surely dead, delete {LOCK} and run this "
                "command again."
            )

    def __exit__(self, *exc_info) -> None:
        self._kvstore.write(LOCK, None, if_equal=self._generation).result()
