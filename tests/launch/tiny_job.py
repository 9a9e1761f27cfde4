"""A job of many processes without a model: joins as glimmer does, adds numbers up, works until stopped.

Its one flag of its own, --gin_bindings=FOLDER, says where each process writes what it saw.
"""

import pathlib
import sys

from glimmer_jax.distributed import join
from glimmer_jax.main import START_AGAIN, parse_flags
from glimmer_jax.preemption import Watcher

flags = parse_flags(sys.argv[1:])
join(False, flags.coordinator_address, flags.num_processes, flags.process_id, timeout=200)

import jax
import numpy as np
from jax.experimental import multihost_utils

report = pathlib.Path(flags.gin_bindings[0]) / str(jax.process_index())
with Watcher(together=True) as watcher:
    total = int(multihost_utils.process_allgather(np.int32(jax.process_index() + 1)).sum())
    report.write_text(f"of {jax.process_count()} total {total}\n")
    step = 0
    while not watcher.requested_at(step):
        multihost_utils.process_allgather(np.int32(step))
        step += 1
with report.open("a") as lines:
    lines.write(f"stopped at {step}\n")
sys.exit(START_AGAIN)
