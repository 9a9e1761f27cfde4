"""The model configuration that is saved with parameters, so that they can be read without gin files."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.recut import NUMERICS
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.weights.file_errors import InvalidWeights, parsing

# Upper bounds for sizes from files: larger than any T5, small enough to build the parameters' names.
_MAX_LAYERS, _MAX_SIZE = 512, 1 << 24


def describe(
    config: GlimmerConfig,
    vocabulary_fingerprint: str,
    task_feature_lengths: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON-able facts that every file of parameters carries.

    The implementation of attention is not one of them: parameters trained on a GPU are read on a CPU.
    Lengths are left out if they are unknown.
    """
    settings = dataclasses.asdict(config)
    del settings["t5"]["attention"]
    lengths = {} if task_feature_lengths is None else dict(task_feature_lengths)
    return {
        "model_config": settings,
        "vocabulary_fingerprint": vocabulary_fingerprint,
        **({"task_feature_lengths": lengths} if lengths else {}),
    }


def config_from(metadata: Mapping[str, Any], path: Any) -> GlimmerConfig | None:
    """The configuration in the metadata of `path`, or None if there is none.

    Settings that are newer than the file have their defaults.

    Raises:
      InvalidWeights: settings are unknown, or have impossible values.
    """
    if "model_config" not in metadata:
        return None
    with parsing(path, "model_config"):
        saved = dict(metadata["model_config"])
        t5 = dict(saved.pop("t5"))
    known = {field.name for cls in (GlimmerConfig, T5Config) for field in dataclasses.fields(cls)}
    if unknown := sorted({*saved, *t5} - known):
        raise InvalidWeights(
            f"{path} has model settings that this version does not know: {unknown}. Use the version "
            "that wrote it."
        )
    with parsing(path, "model_config"):
        _check_types(GlimmerConfig, saved)
        return GlimmerConfig(t5=build_t5(path, **t5), **saved)


def build_t5(path: Any, **settings: Any) -> T5Config:
    """The T5 with settings from a file, whose types and sizes are checked before anything is built.

    Raises:
      InvalidWeights: a setting has another type, or a size is out of bounds.
    """
    with parsing(path, "model configuration"):
        _check_types(T5Config, settings)
        for name, value in settings.items():
            limit = _MAX_LAYERS if name.endswith("_layers") else _MAX_SIZE
            if name != "dropout_rate" and type(value) is int and not 1 <= value <= limit:
                raise ValueError(f"{name} is {value}, expected 1 to {limit}")
        return T5Config(**settings)


def _check_types(cls: type, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a JSON value does not have the type of its field."""
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        hint = hints[name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = tuple(typing.get_origin(option) or option for option in options)
        if tuple in accepted:
            valid = isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
        elif float in accepted:
            valid = type(value) in (int, float)
        else:
            valid = type(value) in accepted  # A bool is not an int here.
        if not valid:
            raise ValueError(f"{name} is {value!r:.40}, expected {hint}")


def differences(a: GlimmerConfig, b: GlimmerConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that change the parameters' tree or what they compute: `{name: (in a, in b)}`."""
    flat_a, flat_b = (
        {**dataclasses.asdict(config), **dataclasses.asdict(config.t5), "t5": None}
        for config in (a, b)
    )
    names = [name for name in flat_a if name not in NUMERICS]
    return {name: (flat_a[name], flat_b[name]) for name in names if flat_a[name] != flat_b[name]}
