"""Chatter is dropped, everything else arrives, even from a process that aborts."""

import subprocess
import sys

import pytest

SCRIPT = """
import os
from glimmer_jax.runtime.filter_stderr import filter_stderr
filter_stderr()
os.write(2, b"I0000 00:00:1.5 7 port.cc:153] oneDNN custom operations are on.\\n")
os.write(2, b"what matters\\n")
os.write(2, b"x" * 200_000 + b"\\n")
{end}
"""


@pytest.mark.parametrize("end, code", [("", 0), ("os.abort()", -6), ("raise SystemExit(2)", 2)])
def test_only_chatter_is_lost(end, code):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, timeout=60
    )
    assert done.returncode == code
    assert done.stderr == b"what matters\n" + b"x" * 200_000 + b"\n"
