"""What is saved with parameters, so that they can be read without their gin files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.recut import NUMERICS
from glimmer_jax.models.t5 import T5Config


def describe(config: GlimmerConfig, vocabulary_fingerprint: str) -> dict[str, Any]:
    """The JSON-able facts that every file of parameters carries.

    How a machine computes attention is none: parameters trained on a GPU are read on a CPU.
    """
    settings = dataclasses.asdict(config)
    del settings["t5"]["attention"]
    return {
        "model_config": settings,
        "vocabulary_fingerprint": vocabulary_fingerprint,
    }


def config_from(metadata: Mapping[str, Any], path: Any) -> GlimmerConfig | None:
    """The configuration in the metadata of `path`; None if there is none.

    Settings that are younger than the file have their defaults.

    Raises:
      ValueError: it is of another version.
    """
    if "model_config" not in metadata:
        return None
    saved = dict(metadata["model_config"])
    t5 = dict(saved.pop("t5"))
    known = {field.name for cls in (GlimmerConfig, T5Config) for field in dataclasses.fields(cls)}
    unknown = sorted({*saved, *t5} - known)
    if unknown:
        raise ValueError(
            f"Checkpoint {path} has model settings that this version does not know: {unknown}."
        )
    return GlimmerConfig(t5=T5Config(**t5), **saved)


def differences(a: GlimmerConfig, b: GlimmerConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that change the parameters' tree or what they compute: `{name: (of a, of b)}`."""
    flat_a, flat_b = (
        {**dataclasses.asdict(one), **dataclasses.asdict(one.t5), "t5": None} for one in (a, b)
    )
    names = [name for name in flat_a if name not in NUMERICS]
    return {name: (flat_a[name], flat_b[name]) for name in names if flat_a[name] != flat_b[name]}
