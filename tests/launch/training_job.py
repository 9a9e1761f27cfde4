"""The toy's training as a job of many processes that ends as glimmer does when it is asked to stop.

Flags as those of `tests.training.toy_job`; the number of each process is in MODEL_DIR.
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
from glimmer_jax.runtime.preemption import StopRequested
from tests.training import toy_job

model_dir, steps = pathlib.Path(flags.gin_bindings[0]), int(flags.gin_bindings[1])
model_dir.mkdir(exist_ok=True)
(model_dir / f"pid{flags.process_id}").write_text(str(os.getpid()))
join(False, flags.coordinator_address, flags.num_processes, flags.process_id, 200, silence=6)
try:
    toy_job.run(model_dir, steps, pause=0.1)
except StopRequested as error:
    print(f"glimmer: {error}", file=sys.stderr)
    sys.exit(RETRY)
