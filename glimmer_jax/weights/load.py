"""Parameters from whatever lies at a path: one function, one result."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from glimmer_jax.memory import versions
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.weights import huggingface, params_file, steps, t5x
from glimmer_jax.weights.huggingface_files import NO_PICKLES
from glimmer_jax.weights.lazy_arrays import has_bytes
from glimmer_jax.weights.model_config import config_from

_PICKLED = (".bin", ".pt", ".pth", ".pkl")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A checkpoint's record of its model and data."""

    config: GlimmerConfig | None  # of the parameters, if recorded or evident from them
    metadata: Mapping[str, Any]  # see `model_config.describe`; of a run's step also its settings
    what: str  # a description for messages
    vocabulary_path: str | None  # a SentencePiece model that lies beside the parameters

    @property
    def vocabulary_fingerprint(self) -> str | None:
        """Fingerprint of the vocabulary that the parameters were trained with, if recorded."""
        fingerprint = self.metadata.get("vocabulary_fingerprint")
        return None if fingerprint is None else str(fingerprint)

    @property
    def task_feature_lengths(self) -> dict[str, Any] | None:
        """`{"inputs": Q, "targets": T, "passages": (K, P)}` of the training, if recorded."""
        return self.metadata.get("task_feature_lengths")

    def answering_config(self, memory_dir: Any | None = None) -> GlimmerConfig:
        """The configuration for inference: that of the parameters, without dropout.

        Args:
          memory_dir: a memory that the model reads, whose codec replaces that of the parameters.

        Raises:
          ValueError: the file does not record a configuration, or there is no finished memory.
        """
        if self.config is None:
            raise ValueError(
                f"{self.what} does not record its model configuration. Give the model that it was "
                "trained as, or export it with one (--run_mode=export)."
            )
        config = self.config.with_t5(dropout_rate=0.0)
        return config if memory_dir is None else with_codec(config, memory_codec(memory_dir))


def memory_codec(memory_dir: Any) -> str:
    """The codec of a finished memory. Raises ValueError if there is none."""
    return versions.read_manifest(open_folder(memory_dir)).identity.codec


def with_codec(config: GlimmerConfig, codec: str) -> GlimmerConfig:
    """The configuration for memory of this codec, whose codebooks are not trained."""
    if codec == config.memory_codec:
        return config
    return dataclasses.replace(config, memory_codec=codec, train_codebooks=False)


@dataclasses.dataclass(frozen=True)
class Loaded(Recorded):
    """Parameters, and what is known about them."""

    # Nested dict of float32 arrays: numpy arrays, or TensorStores that have read nothing yet.
    params: dict[str, Any]


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
    return _open(path, with_params=True)


def read_record(path: Any) -> Recorded:
    """The record of the checkpoint at `path`. Reads no parameter of our own; see `load`."""
    return _open(path, with_params=False)


def _open(path: Any, with_params: bool) -> Loaded:
    text = os.fspath(path)
    params: dict[str, Any] = {}
    if text.endswith(".safetensors"):
        if with_params:
            params, metadata = params_file.load_params_file(text)
        else:
            metadata = params_file.read_config(text)
        what = f"{path}, a parameter file"
        name = params_file.vocabulary_path(text)
        beside = _existing(*os.path.split(os.fspath(name)))
    elif os.path.isfile(text):
        raise _not_the_folder(text)
    else:
        folder = open_folder(text)
        for public in (huggingface, t5x):
            if public.is_folder(folder):
                params, config, metadata, what = public.load(text, folder)
                beside = _existing(text, huggingface.VOCABULARY)
                return Loaded(config, metadata, what, beside, params)
        step = steps.find_step(text)
        if with_params:
            params = steps.restore_params(step.folder)
        metadata = steps.read_metadata(step.folder)
        what = f"step {step.folder.name} of {step.folder.parent}, {step.why}"
        beside = _existing(steps.run_folder(step.folder), huggingface.VOCABULARY)
    return Loaded(config_from(metadata, path), metadata, what, beside, params)


def _existing(folder: Any, name: str) -> str | None:
    place = os.fspath(folder) or "."
    return os.path.join(place, name) if has_bytes(open_folder(place), name) else None


def _not_the_folder(file: str) -> ValueError:
    if os.path.splitext(file)[1] in _PICKLED:
        return ValueError(f"{file} is pickled. {NO_PICKLES}")
    return ValueError(
        f"{file} is a single file. Only NAME.safetensors of --run_mode=export is a checkpoint by "
        f"itself. Give the file's folder, {os.path.dirname(file) or '.'}."
    )
