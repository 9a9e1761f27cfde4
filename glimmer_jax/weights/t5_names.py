"""Parameters as a flat table of names: what a file of weights must hold, and how it becomes our tree.

Names are T5X's, layers one by one (`encoder/layers_3/mlp/wi_0/kernel`). FiD is the cut in which the
encoder is undivided: a whole T5, so public weights become FiD's parameters, and `recut` makes the
other cuts. A divided encoder keeps the names of its parts (`memory_encoder/layers_3/...`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import tensorstore as ts

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.stacking import unstack_layers
from glimmer_jax.models.t5 import T5Config

Shape = tuple[int, ...]


def fid(t5: T5Config) -> GlimmerConfig:
    """The setting that public weights belong to. Its layers are looped."""
    return GlimmerConfig(t5)


def looped(config: GlimmerConfig) -> GlimmerConfig:
    """The same setting with its layers one by one, as files hold them."""
    return dataclasses.replace(config, t5=dataclasses.replace(config.t5, scan_layers=False))


def is_t5(config: GlimmerConfig) -> bool:
    """Whether a setting's parameters are those of a T5: an undivided encoder, a decoder like it."""
    t5 = config.t5
    undivided = not (config.memory_layers or config.rerank_layers)
    return undivided and t5.decoder_sizes == t5.encoder_sizes and t5.cross_attention_period == 1


def shapes(config: GlimmerConfig) -> dict[str, Shape]:
    """Every parameter of a setting and its shape."""
    tree = _tree(config)
    return {_public(name, tree): tuple(leaf.shape) for name, leaf in _flat(tree).items()}


def tree_from(config: GlimmerConfig, read: Callable[[str], Any]) -> dict[str, Any]:
    """A setting's parameters, in looped layers.

    Args:
      config: the setting.
      read: gives the array of a name, of numpy or TensorStore.

    Returns:
      TensorStores of float32: nothing is read but what `read` has read.
    """
    tree = _tree(config)
    flat = {name: float32(read(_public(name, tree))) for name in sorted(_flat(tree))}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def flat_from(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `tree_from`, for parameters in scanned or looped layers."""
    tree = unstack_layers(dict(params))
    return {_public(name, tree): leaf for name, leaf in _flat(tree).items()}


def differences(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """In words, each parameter that is missing, extra or misshapen, by its name."""
    missing = [f"{name} {list(wanted[name])} is missing" for name in wanted if name not in found]
    extra = [f"{name} {list(found[name])} is not wanted" for name in found if name not in wanted]
    misshapen = [
        f"{name} has shape {list(found[name])} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return sorted(missing + extra + misshapen)


def check(path: Any, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compares names and shapes, both in the file's own terms.

    Raises:
      ValueError: parameters are missing, extra or misshapen; all of them are named.
    """
    if problems := differences(wanted, found):
        raise ValueError(
            f"The weights in {path} are not those of a model of the sizes they claim; "
            f"{len(problems)} parameters differ: {'; '.join(problems)}. Give the folder of a T5, "
            "whole."
        )


def in_words(params: Mapping[str, Any], t5: T5Config) -> str:
    """What a checkpoint turned out to hold, for the person who gave it."""
    count = sum(leaf.size for leaf in flax.traverse_util.flatten_dict(params).values())
    return (
        f"{count:,} parameters, {t5.num_encoder_layers} and {t5.num_decoder_layers} layers of width "
        f"{t5.emb_dim}, {t5.mlp_activations}, output layer {'tied' if t5.tie_output else 'of its own'}"
    )


def float32(array: Any) -> ts.TensorStore:
    """An array of numpy or TensorStore as a TensorStore of float32, of which nothing is read."""
    store = array if isinstance(array, ts.TensorStore) else ts.array(np.asarray(array))
    return store if store.dtype == ts.float32 else ts.cast(store, ts.float32)


@functools.lru_cache(maxsize=16)
def _tree(config: GlimmerConfig) -> dict[str, Any]:
    return GlimmerModel(looped(config)).abstract_variables()[0]


def _public(name: str, tree: Mapping[str, Any]) -> str:
    divided = "memory_encoder" in tree or "live_a" in tree["live_encoder"]
    if name.startswith("live_encoder/") and not divided:
        return f"encoder/{name.removeprefix('live_encoder/').removeprefix('live_b/')}"
    return name


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
