"""Where a run's first state comes from."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.training.params_file import load_params_file
from glimmer_jax.training.restore import find_step, read_metadata, restore_params
from glimmer_jax.training.state import TrainState, abstract_state, init_state, state_from_params

# What two runs must share to be one run.
SAME_RUN = ("vocabulary_fingerprint", "seed")


def start_state(
    checkpoints: Checkpoints,
    optimizer: Optimizer,
    mesh: Mesh,
    fresh: Callable[[], Any],
    *,
    initial: Callable[[], Any] | None = None,
    public: Callable[[], Any] | None = None,
) -> tuple[TrainState, str]:
    """The state a run begins with, and in words where it came from.

    Args:
      checkpoints: the run's own.
      optimizer: of the run.
      mesh: where the state is to lie.
      fresh: traceable; new parameters.
      initial: loads the parameters of a given checkpoint (`load_initial_params`, recut if need be).
      public: loads the parameters of public T5 weights.

    Raises:
      ValueError: the run's own checkpoint is of another run, or damaged.
    """
    # 1. The run's own newest checkpoint: a restarted command goes on where it was.
    if (step := checkpoints.latest_step()) is not None:
        _check_same_run(checkpoints, step)
        target = abstract_state(optimizer, jax.eval_shape(fresh), mesh)
        return checkpoints.restore(target, step), f"step {step} of {checkpoints.directory}"
    # 2. The checkpoint the user gave: parameters only, the optimiser begins anew.
    if initial is not None:
        return state_from_params(initial(), optimizer, mesh), "the given checkpoint"
    # 3. Public T5 weights.
    if public is not None:
        return state_from_params(public(), optimizer, mesh), "public weights"
    # 4. Nothing: random parameters.
    return init_state(fresh, optimizer, mesh), "random parameters"


def load_initial_params(path: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as numpy arrays, what the file says of itself) of any checkpoint of ours.

    Args:
      path: a `.safetensors` file with its JSON, a step's folder, or a run's folder.

    Raises:
      ValueError: none of these, or damaged.
    """
    if str(path).endswith(".safetensors"):
        return load_params_file(path)
    folder = find_step(path)
    return restore_params(folder), read_metadata(folder)


def _check_same_run(checkpoints: Checkpoints, step: int) -> None:
    saved = checkpoints.metadata(step)
    for key in SAME_RUN:
        ours = checkpoints.run_metadata.get(key)
        if saved.get(key) != ours:
            raise ValueError(
                f"{checkpoints.directory} holds a run with {key} {saved.get(key)!r}, and this one "
                f"has {ours!r}. Choose another MODEL_DIR, or the settings of that run; to start "
                "from its parameters, give it as INITIAL_CHECKPOINT_PATH."
            )
