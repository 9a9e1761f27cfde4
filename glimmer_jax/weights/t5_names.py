"""A whole T5 as a flat table of names: what public weights must hold, and how it becomes FiD's tree.

Names are T5X's, layers one by one (`encoder/layers_3/mlp/wi_0/kernel`). FiD is the cut in which the
encoder is undivided, so public weights become FiD's parameters, and `recut` makes the other cuts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.stacking import unstack_layers
from glimmer_jax.models.t5 import T5Config

Shape = tuple[int, ...]


def fid(t5: T5Config) -> GlimmerConfig:
    """The setting that public weights belong to. Its layers are looped."""
    return GlimmerConfig(t5)


def shapes(t5: T5Config) -> dict[str, Shape]:
    """Every parameter of a T5 and its shape."""
    tree, _ = GlimmerModel(fid(t5)).abstract_variables()
    return {_public(name): tuple(leaf.shape) for name, leaf in _flat(tree).items()}


def tree_from(t5: T5Config, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """FiD's parameters, float32; `read` gives the array of a name, one at a time."""
    tree, _ = GlimmerModel(fid(t5)).abstract_variables()
    flat = {
        name: np.ascontiguousarray(read(_public(name)), np.float32) for name in sorted(_flat(tree))
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def flat_from(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `tree_from`, for parameters of FiD in scanned or looped layers."""
    return {_public(name): leaf for name, leaf in _flat(unstack_layers(dict(params))).items()}


def check(path: Any, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compares names and shapes, both in the file's own terms.

    Raises:
      ValueError: parameters are missing, extra or misshapen; all of them are named.
    """
    missing = [f"{name} {list(wanted[name])} is missing" for name in wanted if name not in found]
    extra = [f"{name} {list(found[name])} is not wanted" for name in found if name not in wanted]
    misshapen = [
        f"{name} has shape {list(found[name])} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems := sorted(missing + extra + misshapen):
        raise ValueError(
            f"The weights in {path} are not those of a T5 of the sizes they claim; "
            f"{len(problems)} parameters differ: {'; '.join(problems)}. Give the folder of a T5, "
            "whole."
        )


def _public(name: str) -> str:
    if name.startswith("live_encoder/"):
        rest = name.removeprefix("live_encoder/").removeprefix("live_b/")
        return f"encoder/{rest}"
    return name


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
