"""`python dying_job.py FLAGS`: glimmer, whose process 1 is killed once the job's output is complete."""

import os
import signal
import sys

import jax

from glimmer_jax import main
from glimmer_jax.modes import outputs

meet = outputs.multihost_utils.sync_global_devices


def dying_meet(name):
    if jax.process_index() == 1:
        # When process 0 waits here, it has written the output.
        while not os.path.exists(os.environ["OUTPUT"]):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    meet(name)


if __name__ == "__main__":
    outputs.multihost_utils.sync_global_devices = dying_meet
    sys.argv[0] = "glimmer"
    main.run()
