"""Child processes of tests: none outlives its test, and none inherits what `nohup` ignores."""

import contextlib
import os
import pathlib
import signal
import subprocess


@contextlib.contextmanager
def running(argv, **options):
    """A process, as `subprocess.Popen` starts it. When the context ends, it and its children end too."""
    process = subprocess.Popen([*_default_hangup(), *argv], **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in (process.pid, *descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def descendants(pid):
    """Ids of the processes that a process started, directly and indirectly."""
    children = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found = children.get(pid, [])
    for child in found:
        found.extend(children.get(child, []))
    return found


def _default_hangup():
    """Under nohup SIGHUP arrives ignored, and children inherit that."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return ("env", "--default-signal=HUP") if ignored else ()
