"""`python dying_job.py FLAGS`: glimmer, whose process 1 is killed when the job's output is complete."""

import os
import signal
import sys
import time

# Nothing that imports JAX: `run` registers what is done at the end first.
from glimmer_jax import main

work = main.main


def dying_main():
    code = work()
    if "--process_id=1" in sys.argv:
        while not os.path.exists(os.environ["OUTPUT"]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return code


if __name__ == "__main__":
    main.main = dying_main
    main.run()
