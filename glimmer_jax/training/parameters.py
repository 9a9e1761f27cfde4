"""Parameters of any checkpoint of ours, for the model at hand: checked, recut, placed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax import partitioning
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.training.source import load_initial_params


def describe(model: GlimmerModel, vocabulary_fingerprint: str) -> dict[str, Any]:
    """What is saved with parameters, so that they can be read without their gin files."""
    return {
        "model_config": dataclasses.asdict(model.config),
        "vocabulary_fingerprint": vocabulary_fingerprint,
    }


def config_from(metadata: Mapping[str, Any], path: Any) -> GlimmerConfig:
    """The configuration in a checkpoint's metadata.

    Raises:
      ValueError: there is none, or it is of another version.
    """
    if "model_config" not in metadata:
        raise ValueError(
            f"Checkpoint {path} does not say which model it holds (no model_config). Use one that "
            "--run_mode=train or --run_mode=export has written."
        )
    saved = dict(metadata["model_config"])
    t5 = dict(saved.pop("t5"))
    known = {field.name for cls in (GlimmerConfig, T5Config) for field in dataclasses.fields(cls)}
    unknown = sorted({*saved, *t5} - known)
    if unknown:
        raise ValueError(
            f"Checkpoint {path} has model settings that this version does not know: {unknown}."
        )
    return GlimmerConfig(t5=T5Config(**t5), **saved)


def load(path: Any, model: GlimmerModel, vocabulary_fingerprint: str) -> dict[str, Any]:
    """Parameters for `model` from a run's folder, a step's, or a `.safetensors` file.

    A checkpoint of another cut of the same sizes is recut.

    Raises:
      ValueError: no checkpoint there, damaged, of another vocabulary, or of other sizes.
    """
    params, metadata = load_initial_params(path)
    theirs = metadata.get("vocabulary_fingerprint")
    if theirs != vocabulary_fingerprint:
        raise ValueError(
            f"Checkpoint {path} was trained with vocabulary {theirs}, and the vocabulary given is "
            f"{vocabulary_fingerprint}. Give the checkpoint's vocabulary."
        )
    source = config_from(metadata, path)
    if source != model.config:
        params = recut(params, source, model.config)
    shapes, _ = model.abstract_variables()
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), shapes)
    got = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if wanted != got:
        raise ValueError(
            f"The parameters of {path} do not have the shapes that their model_config promises. "
            "Fetch or write the checkpoint again."
        )
    return params


def place(params: Any, model: GlimmerModel, mesh: Mesh) -> Any:
    """The parameters on the mesh."""
    shapes, names = model.abstract_variables()
    partitioning.check_divisible(shapes, names, mesh)
    return jax.device_put(params, partitioning.shardings(names, mesh))
