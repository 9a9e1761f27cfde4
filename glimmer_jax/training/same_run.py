"""Whether a run's checkpoint and the command that would go on with it are of one run."""

import json
from collections.abc import Mapping
from typing import Any

from glimmer_jax.weights.model_config import config_from, differences

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
