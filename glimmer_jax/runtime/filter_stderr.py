"""Keeps the chatter of native libraries out of the terminal.

tensorflow and its copy of SentencePiece write information straight to file descriptor 2, whatever
their settings; a person looking for the one line that matters would have to find it among them. The
filter is a process of its own, this file run as a script: a thread would stand still while native
code holds the interpreter, and the last words of a process that aborts would die with it.
"""

import atexit
import os
import re
import subprocess
import sys

_CHATTER = re.compile(
    rb"(?:I\d{4} .*\b(?:port|cudart_stub|cpu_feature_guard)\.cc:\d+\]"
    rb"|WARNING: All log messages before absl::InitializeLog"
    rb"|normalizer\.cc\(\d+\) LOG\(INFO\))"
)


def filter_stderr() -> None:
    """From now on, lines of known chatter are dropped; everything else passes unchanged."""
    real = os.dup(2)
    child = subprocess.Popen(
        # Without site packages it starts in a few milliseconds.
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=real,
        # Ctrl-C is for the work; the filter ends when there is nothing more to read.
        start_new_session=True,
    )
    assert child.stdin is not None
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()

    def restore() -> None:
        sys.stderr.flush()
        os.dup2(real, 2)
        child.wait()

    atexit.register(restore)


def _forward() -> None:
    for line in sys.stdin.buffer:
        if not _CHATTER.match(line):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _forward()
