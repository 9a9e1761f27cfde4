"""Keeps the chatter of native libraries out of the terminal.

tensorflow and its copy of SentencePiece write information straight to file descriptor 2, whatever
their settings; a person looking for the one line that matters would have to find it among them.
"""

import atexit
import os
import re
import sys
import threading

_CHATTER = re.compile(
    rb"^(?:I\d{4} .*\b(?:port|cudart_stub|cpu_feature_guard)\.cc:\d+\]"
    rb"|WARNING: All log messages before absl::InitializeLog"
    rb"|normalizer\.cc\(\d+\) LOG\(INFO\))"
)


def filter_stderr() -> None:
    """From now on, lines of known chatter are dropped; everything else passes unchanged."""
    real = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)

    def forward() -> None:
        with os.fdopen(read_end, "rb") as lines:
            for line in lines:
                if not _CHATTER.match(line):
                    os.write(real, line)

    thread = threading.Thread(target=forward, name="stderr", daemon=True)
    thread.start()

    def restore() -> None:
        sys.stderr.flush()
        # The last writing end is closed, so the thread reads to the end and stops.
        os.dup2(real, 2)
        thread.join(timeout=5)

    atexit.register(restore)
