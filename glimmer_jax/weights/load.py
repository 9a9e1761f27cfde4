"""Parameters from whatever lies at a path: one function, one result."""

import dataclasses
import os
from typing import Any

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.weights import huggingface, params_file, steps, t5x
from glimmer_jax.weights.huggingface_files import NO_PICKLES
from glimmer_jax.weights.model_config import config_from

_PICKLED = (".bin", ".pt", ".pth", ".pkl")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters, and what is known about them."""

    # Nested dict of float32 arrays: numpy arrays, or TensorStores that have read nothing yet.
    params: dict[str, Any]
    config: GlimmerConfig | None  # their configuration, if the file records it
    vocabulary_fingerprint: str | None  # of the vocabulary they were trained with, if recorded
    what: str  # a description for messages

    def answering_config(self) -> GlimmerConfig:
        """The configuration for inference: that of the parameters, without dropout.

        Raises:
          ValueError: the file does not record a configuration.
        """
        if self.config is None:
            raise ValueError(
                f"{self.what} does not record its model configuration. Give the model that it was "
                "trained as, or export it with one (--run_mode=export)."
            )
        t5 = dataclasses.replace(self.config.t5, dropout_rate=0.0)
        return dataclasses.replace(self.config, t5=t5)


def load(path: Any) -> Loaded:
    """Opens or reads parameters; `parameters.place` transfers them to the devices.

    Args:
      path: a `.safetensors` file of `--run_mode=export` with its JSON; the folder of a T5 in the form
        of Hugging Face or T5X, local or in a bucket (`gs://...`); the folder of a step; or that of a
        run (its best step, or its newest).

    Raises:
      OSError: the storage failed or denied access.
      ValueError: none of these, a single file of a folder, damaged, or of another version.
    """
    text = os.fspath(path)
    if text.endswith(".safetensors"):
        params, metadata = params_file.load_params_file(text)
        what = f"{path}, a parameter file"
    elif os.path.isfile(text):
        raise _not_the_folder(text)
    else:
        folder = open_folder(text)
        for public in (huggingface, t5x):
            if public.is_folder(folder):
                return Loaded(*public.load(text, folder))
        step = steps.find_step(text)
        params, metadata = steps.restore_params(step.folder), steps.read_metadata(step.folder)
        what = f"step {step.folder.name} of {step.folder.parent}, {step.why}"
    config = config_from(metadata, path)
    return Loaded(params, config, metadata.get("vocabulary_fingerprint"), what)


def _not_the_folder(file: str) -> ValueError:
    if os.path.splitext(file)[1] in _PICKLED:
        return ValueError(f"{file} is pickled. {NO_PICKLES}")
    return ValueError(
        f"{file} is a single file. Only NAME.safetensors of --run_mode=export is a checkpoint by "
        f"itself. Give the file's folder, {os.path.dirname(file) or '.'}."
    )
