"""A job of many processes without a model: joins as glimmer does, adds numbers up, works until stopped.

Flags of its own: --gin_bindings=FOLDER, where each process writes what it saw; then optionally seconds
to wait for the others to join, and seconds after which a silent process ends the job.
"""

import os
import pathlib
import sys

from glimmer_jax.main import parse_flags
from glimmer_jax.runtime.exit_codes import RETRY
from glimmer_jax.runtime.supervisor import work_in_child

flags = parse_flags(sys.argv[1:])
work_in_child(RETRY)

from glimmer_jax.runtime.distributed import join

times = dict(zip(("timeout", "silence"), map(int, flags.gin_bindings[1:]), strict=False))
join(False, flags.coordinator_address, flags.num_processes, flags.process_id, **times)

import jax
import numpy as np
from jax.experimental import multihost_utils

from glimmer_jax.runtime.preemption import STOP

report = pathlib.Path(flags.gin_bindings[0]) / str(jax.process_index())
with STOP.installed():
    total = int(multihost_utils.process_allgather(np.int32(jax.process_index() + 1)).sum())
    # Whoever waits for the file finds it complete.
    written = report.with_suffix(".part")
    written.write_text(f"of {jax.process_count()} total {total}\n{os.getpid()}\n")
    written.replace(report)
    step = 0
    while not STOP.agreed():
        multihost_utils.process_allgather(np.int32(step))
        step += 1
with report.open("a") as lines:
    lines.write(f"stopped at {step}\n")
sys.exit(RETRY)
