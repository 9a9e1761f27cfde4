"""The initial state of a run: its own checkpoint, given parameters, or random ones."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from glimmer_jax.weights.model_config import config_from, differences

# Metadata that must not change when a run resumes. The position in the data is `step * batch_size`
# within an order that depends on the seed, the mixture, its split, its lengths and its filter. The
# initial checkpoint and the end of the schedule would be ignored for the steps that are done.
RESUME_SETTINGS = (
    "data_order",
    "vocabulary_fingerprint",
    "seed",
    "mixture_or_task_name",
    "split",
    "task_feature_lengths",
    "batch_size",
    "min_bleu_score",
    "use_cached_tasks",
    "initial_checkpoint_path",
    "schedule_end",
)

# The version of the order of examples in checkpoints that do not record it.
FIRST_DATA_ORDER = 1


def restore(
    checkpoints: Checkpoints,
    optimizer: Optimizer,
    mesh: Mesh,
    fresh_params: Callable[[], Any],
    load_initial: Callable[[], Any] | None = None,
) -> tuple[TrainState, str]:
    """The initial state of a run, placed on `mesh`, and a description of its source.

    Args:
      checkpoints: those of the run.
      optimizer: that of the run.
      mesh: the devices that will hold the state.
      fresh_params: traceable; returns random parameters.
      load_initial: loads the parameters of `INITIAL_CHECKPOINT_PATH` (`weights.parameters.load`). It
        is called only if the run has no checkpoint.

    Raises:
      ValueError: the run's checkpoint has other settings, or does not fit `optimizer`.
    """
    # 1. The newest intact checkpoint of the run itself: a restarted command resumes.
    if (step := checkpoints.latest_step()) is not None:
        check_resume_compatible(
            checkpoints.metadata(step), checkpoints.run_metadata, checkpoints.directory
        )
        target = abstract_state(optimizer, jax.eval_shape(fresh_params), mesh)
        return checkpoints.restore(target, step), f"step {step} of {checkpoints.directory}"
    # 2. Parameters of a given checkpoint, recut from FiD, LUMEN or GLIMMER.
    # 3. Parameters of a public T5, recut likewise. Both start at step 0 with a new optimiser state.
    if load_initial is not None:
        return state_from_params(load_initial(), optimizer, mesh), "INITIAL_CHECKPOINT_PATH"
    # 4. Random parameters.
    return init_state(fresh_params, optimizer, mesh), "random parameters"


def check_resume_compatible(
    saved: Mapping[str, Any], current: Mapping[str, Any], directory: Any
) -> None:
    """Compares a checkpoint's metadata with the settings of the run that resumes from it.

    Model settings are compared if they change what the model computes. A setting that an older
    checkpoint does not record is not compared, except for the order of examples.

    Raises:
      ValueError: settings differ; the message names each of them with both values.
    """
    current = json.loads(json.dumps(current))  # Tuples become lists, as in the saved metadata.
    if "data_order" in current:
        saved = {"data_order": FIRST_DATA_ORDER, **saved}
    differing = {
        key: (saved[key], current.get(key))
        for key in RESUME_SETTINGS
        if key in saved and saved[key] != current.get(key)
    }
    configs = (config_from(saved, directory), config_from(current, directory))
    if configs[0] is not None and configs[1] is not None:
        differing |= differences(configs[0], configs[1])
    if differing:
        listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, (a, b) in differing.items())
        if "data_order" in differing:
            listed += (
                " (this version reads examples in another order than the one that began the run)"
            )
        raise ValueError(
            f"MODEL_DIR: the run in {directory} has other settings: {listed}. Restore these settings "
            "or choose another MODEL_DIR. To start a new run from its parameters, set "
            "INITIAL_CHECKPOINT_PATH to it."
        )
