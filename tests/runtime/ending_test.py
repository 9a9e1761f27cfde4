"""What is done last in a process, in processes of its own."""

import subprocess
import sys

import pytest

from glimmer_jax.runtime import ending

SCRIPT = """
import atexit, sys
from glimmer_jax.runtime import ending

class Loud:
    def __del__(self):
        print("freed")

{install}
atexit.register(print, "left the job")
ending.before_end(lambda: print("released"))
kept = Loud()
print("done")
{end}
sys.exit({code})
"""


@pytest.mark.parametrize(
    "install, end, code, printed",
    [
        # Nothing comes after the release of a lock.
        ("ending.install()", "ending.end_with(0)", 0, ["done", "left the job", "released"]),
        ("ending.install()", "", 2, ["done", "left the job", "released", "freed"]),
        ("", "", 0, ["released", "done", "left the job", "freed"]),
    ],
)
def test_the_last_work_follows_all_exit_handlers(install, end, code, printed):
    script = SCRIPT.format(install=install, end=end, code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.split("\n")[:-1] == printed


def test_in_a_process_of_others_nothing_waits():
    called = []
    ending.before_end(lambda: called.append(1))
    assert called == [1]
