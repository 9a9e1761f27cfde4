"""Where a run's first state comes from."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.training.same_run import check_same_run
from glimmer_jax.training.state import TrainState, abstract_state, init_state, state_from_params


def start_state(
    checkpoints: Checkpoints,
    optimizer: Optimizer,
    mesh: Mesh,
    fresh: Callable[[], Any],
    initial: Callable[[], Any] | None = None,
) -> tuple[TrainState, str]:
    """The state a run begins with, and in words where it came from.

    Args:
      checkpoints: the run's own.
      optimizer: of the run.
      mesh: where the state is to lie.
      fresh: traceable; new parameters.
      initial: loads the parameters that the user gave: any checkpoint of ours, or public T5
        weights (`weights.load`, recut if need be). Called only if they are needed.

    Raises:
      ValueError: the run's own checkpoint is of another run, or damaged.
    """
    # 1. The run's own newest checkpoint: a restarted command goes on where it was.
    if (step := checkpoints.latest_step()) is not None:
        metadata = checkpoints.metadata(step)
        check_same_run(metadata, checkpoints.run_metadata, checkpoints.directory)
        target = abstract_state(optimizer, jax.eval_shape(fresh), mesh)
        return checkpoints.restore(target, step), f"step {step} of {checkpoints.directory}"
    # 2. The weights the user gave: parameters only, the optimiser begins anew.
    if initial is not None:
        return state_from_params(initial(), optimizer, mesh), "the given weights"
    # 3. Nothing: random parameters.
    return init_state(fresh, optimizer, mesh), "random parameters"
