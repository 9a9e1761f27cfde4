"""Parameters from whatever lies at a path: one function, one result."""

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.weights import huggingface, params_file, steps, t5x
from glimmer_jax.weights.model_config import config_from


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters, and what is known about them."""

    params: dict[str, Any]  # nested dict of float32 numpy arrays
    config: GlimmerConfig | None  # the setting they belong to, where the file says so
    vocabulary_fingerprint: str | None  # of the vocabulary they were trained with, where it says so
    what: str  # what was found, for people


def load(path: Any) -> Loaded:
    """Reads parameters to the host.

    Args:
      path: a `.safetensors` file of ours with its JSON; the folder of a T5 as Hugging Face or T5X
        write it (their vocabulary is not known); the folder of a step, or that of a run (its best
        step, or its newest).

    Raises:
      ValueError: none of these, damaged, or of another version.
    """
    path = epath.Path(path)
    if path.suffix == ".safetensors":
        params, metadata = params_file.load_params_file(path)
        what = f"{path}, a parameter file"
    elif (public := _public_reader(path)) is not None:
        params, public_config, what = public(path)
        return Loaded(params, public_config, None, what)
    else:
        step = steps.find_step(path)
        params, metadata = steps.restore_params(step.folder), steps.read_metadata(step.folder)
        what = f"step {step.folder.name} of {step.folder.parent}, {step.why}"
    config = config_from(metadata, path)
    return Loaded(params, config, metadata.get("vocabulary_fingerprint"), what)


def _public_reader(path: epath.Path) -> Callable[[Any], tuple[Any, GlimmerConfig, str]] | None:
    if huggingface.is_folder(path):
        return huggingface.load
    return t5x.load if t5x.is_folder(path) else None
