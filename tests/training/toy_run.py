"""A training run of the toy as a process of its own: `toy_run MODEL_DIR STEPS [KILL]`.

At step KILL the process kills itself with -9 while the data of that step is made.
"""

import os
import signal
import sys

import jax

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.training.toy_model import ToyModel, batch_at, train


def main(model_dir, total_steps, kill_at=None):
    model = ToyModel(dropout_rate=0.1)

    def make_batches(step):
        while True:
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch_at(step)
            step += 1

    train(
        TrainConfig(total_steps=total_steps, checkpoint_every=3, log_every=2, keep_latest=1),
        model,
        make_optimizer(OptimizerConfig(learning_rate=0.03), model.param_names()),
        make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        model_dir,
        make_batches,
        model.init,
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
