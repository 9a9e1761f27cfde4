"""The toy's training as a job of many processes: flags as glimmer's, and MODEL_DIR and STEPS.

`--gin_bindings=MODEL_DIR --gin_bindings=STEPS`. A process that is silent for four seconds ends it; the
number of each is in MODEL_DIR.
"""

import os
import pathlib
import sys
import time

if __name__ == "__main__":
    from glimmer_jax.main import parse_flags
    from glimmer_jax.runtime.exit_codes import RETRY
    from glimmer_jax.runtime.supervisor import work_in_child

    flags = parse_flags(sys.argv[1:])
    work_in_child(RETRY)

from glimmer_jax import partitioning
from glimmer_jax.runtime.distributed import join
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.training.toy_model import ToyModel, batch_at, train


def run(model_dir, steps, devices=None, pause=0.0):
    """Trains on four devices, on which parameters and batch are divided; returns the parameters."""
    model = ToyModel(dropout_rate=0.1)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=2), devices)
    rows = partitioning.own_rows(mesh, len(batch_at(0)["tokens"]))

    def make_batches(step):
        while True:
            time.sleep(pause)
            yield {name: array[rows] for name, array in batch_at(step).items()}
            step += 1

    config = TrainConfig(total_steps=steps, checkpoint_every=5, log_every=1)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.03), model.param_names())
    return train(config, model, optimizer, mesh, model_dir, make_batches, model.init).params


if __name__ == "__main__":
    model_dir, steps = pathlib.Path(flags.gin_bindings[0]), int(flags.gin_bindings[1])
    model_dir.mkdir(exist_ok=True)
    (model_dir / f"pid{flags.process_id}").write_text(str(os.getpid()))
    join(False, flags.coordinator_address, flags.num_processes, flags.process_id, 200, silence=4)
    # Long enough steps that one of them can be met.
    run(model_dir, steps, pause=0.1)
