"""Drops the log lines of native libraries from stderr.

TensorFlow and its copy of SentencePiece log to file descriptor 2 whatever their settings. The filter is
a separate process, this file run as a script: a thread would block while native code holds the
interpreter lock, and the last lines of a process that aborts would be lost with it.
"""

import atexit
import os
import re
import subprocess
import sys

_LOG_LINE = re.compile(
    rb"(?:I\d{4} .*\b(?:port|cudart_stub|cpu_feature_guard)\.cc:\d+\]"
    rb"|WARNING: All log messages before absl::InitializeLog"
    rb"|normalizer\.cc\(\d+\) LOG\(INFO\))"
)


def filter_stderr() -> None:
    """Drops known log lines from now on; everything else passes unchanged."""
    real = os.dup(2)
    child = subprocess.Popen(
        # Without site packages it starts in a few milliseconds.
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=real,
        # Ctrl-C is for the job; the filter ends at the end of its input.
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
        if not _LOG_LINE.match(line):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _forward()
