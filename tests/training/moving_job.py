"""A toy run that resumes with other processes on another mesh, and checks its restored state.

`--gin_bindings=MODEL_DIR --gin_bindings=STEPS --gin_bindings=DATA,FSDP,MODEL` and the flags of a job
of many processes. The restored state must equal, bit by bit, the numpy arrays that the previous job
left beside the run. At the end process 0 writes those of its own state. With `--gin_bindings=SECONDS`,
the third step is followed by an evaluation of that many batches, one second each.
"""

import pathlib
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from glimmer_jax import partitioning
from glimmer_jax.main import parse_flags
from glimmer_jax.runtime.distributed import join
from glimmer_jax.runtime.exit_codes import RETRY
from glimmer_jax.runtime.preemption import StopRequested
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.training.toy_model import ToyModel, batch_at, train


def main(argv):
    flags = parse_flags(argv)
    join(False, flags.coordinator_address, flags.num_processes, flags.process_id, 200, silence=20)
    model_dir, steps = pathlib.Path(flags.gin_bindings[0]), int(flags.gin_bindings[1])
    data, fsdp, model_axis = map(int, flags.gin_bindings[2].split(","))
    mesh = partitioning.make_mesh(
        partitioning.MeshConfig(data=data, fsdp=fsdp, model=model_axis), jax.devices()
    )
    rows = partitioning.own_rows(mesh, len(batch_at(0)["tokens"]))
    seconds = int(flags.gin_bindings[3]) if flags.gin_bindings[3:] else 0
    left, compared = model_dir.with_suffix(".npz"), []

    def make_batches(step):
        while True:
            yield {name: array[rows] for name, array in batch_at(step).items()}
            step += 1

    def compare(state):
        if int(state.step) == 0:
            return
        with np.load(left) as wanted:
            for name, leaf in named(state).items():
                for shard in leaf.addressable_shards:
                    np.testing.assert_array_equal(shard.data, wanted[name][shard.index], name)
                    assert shard.data.dtype == wanted[name].dtype
                    compared.append(shard.data.size < leaf.size)
            assert len(wanted) == len(named(state))
        assert any(compared) == (mesh.size > 1), "Nothing was sharded."

    def evaluate(state, poll):
        print("evaluating", flush=True)
        for _ in range(seconds):
            poll()
            time.sleep(1.0)
        return {"exact_match": 0.5}

    model = ToyModel(dropout_rate=0.1)
    # First moments too, and second ones of rows and columns.
    config = OptimizerConfig(learning_rate=0.03, momentum=0.9, min_dim_size_to_factor=1)
    state = train(
        TrainConfig(
            total_steps=steps, checkpoint_every=1, log_every=1, eval_every=3 if seconds else 0
        ),
        model,
        make_optimizer(config, model.param_names()),
        mesh,
        model_dir,
        make_batches,
        model.init,
        check_restored=compare,
        evaluate=evaluate,
    )
    gathered = multihost_utils.process_allgather(named(state), tiled=True)
    if jax.process_index() == 0:
        np.savez(left, **gathered)


def named(state):
    """Step, parameters and optimiser state, by their places in the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except StopRequested as error:
        print(error, flush=True)
        sys.exit(RETRY)
