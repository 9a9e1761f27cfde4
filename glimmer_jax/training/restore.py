"""Where a run's first state comes from.

Whether a run's checkpoint and the command that would go on with it are of one run.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from glimmer_jax.weights.model_config import config_from, differences


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


# What two starts of one run must share, by its name in the metadata. The position in the stream of
# examples is step x batch size, in an order that mixture, split, lengths and seed decide, of those that
# the filter by provenance lets through. A run that goes on reads its own parameters: another initial
# checkpoint would be passed over without a word, as would the steps taken at the rates of a schedule with
# another end.
SAME_RUN = (
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


def check_same_run(saved: Mapping[str, Any], ours: Mapping[str, Any], directory: Any) -> None:
    """Compares the metadata of a checkpoint with that of the run that is about to go on.

    Settings of the model count where they change what it computes. What an older checkpoint does
    not say is not compared.

    Raises:
      ValueError: they differ; everything that does is named with both its values.
    """
    ours = json.loads(json.dumps(ours))  # as it would be saved: tuples are lists
    differing = {
        key: (saved[key], ours.get(key))
        for key in SAME_RUN
        if key in saved and saved[key] != ours.get(key)
    }
    configs = (config_from(saved, directory), config_from(ours, directory))
    if configs[0] is not None and configs[1] is not None:
        differing |= differences(configs[0], configs[1])
    if differing:
        named = "; ".join(f"{key} {a!r}, and this one {b!r}" for key, (a, b) in differing.items())
        raise ValueError(
            f"{directory} holds a run with {named}. Choose another MODEL_DIR, or the settings of "
            "that run; to start from its parameters, give it as INITIAL_CHECKPOINT_PATH."
        )
