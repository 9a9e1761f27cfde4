"""Parameters by T5X's names: what a file of weights must hold, and how it becomes our tree.

Layers are unrolled (`encoder/layers_3/mlp/wi_0/kernel`). FiD is an undivided T5, so public weights
become FiD's parameters, and `recut` makes the other models from them. A divided encoder keeps the
names of its parts (`memory_encoder/layers_3/...`).
"""

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
from glimmer_jax.weights.file_errors import InvalidWeights

Shape = tuple[int, ...]


def unrolled(config: GlimmerConfig) -> GlimmerConfig:
    """The same configuration with unrolled layers, as in files."""
    return config.with_t5(scan_layers=False)


def is_t5(config: GlimmerConfig) -> bool:
    """Whether the parameters are those of a T5: one undivided encoder, a decoder of its sizes."""
    t5 = config.t5
    undivided = not (config.memory_layers or config.rerank_layers)
    return undivided and t5.decoder_sizes == t5.encoder_sizes and t5.cross_attention_period == 1


def shapes(config: GlimmerConfig) -> dict[str, Shape]:
    """The shape of every parameter of a configuration, by name."""
    tree = _tree(config)
    return {_public(name, tree): tuple(leaf.shape) for name, leaf in _flat(tree).items()}


def tree_from(config: GlimmerConfig, read: Callable[[str], Any]) -> dict[str, Any]:
    """The parameters of a configuration, with unrolled layers.

    Args:
      config: the configuration.
      read: returns the array of a name, a numpy array or a TensorStore.

    Returns:
      Nested dict of float32 TensorStores, which read nothing yet.
    """
    tree = _tree(config)
    flat = {name: float32(read(_public(name, tree))) for name in sorted(_flat(tree))}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def flat_from(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `tree_from`, for scanned or unrolled layers."""
    tree = unstack_layers(dict(params))
    return {_public(name, tree): leaf for name, leaf in _flat(tree).items()}


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """A description of each parameter that is missing, extra or misshapen."""
    missing = [
        f"{name} {list(expected[name])} is missing" for name in expected if name not in found
    ]
    extra = [f"{name} {list(found[name])} is unexpected" for name in found if name not in expected]
    misshapen = [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return sorted(missing + extra + misshapen)


def check_layers(path: Any, config: GlimmerConfig, num_parameters: int) -> None:
    """Raises InvalidWeights if there are fewer parameters than layers, before names are built."""
    layers = config.t5.num_encoder_layers + config.t5.num_decoder_layers
    if layers > num_parameters:
        raise InvalidWeights(
            f"{path}: its configuration has {layers} layers, and its files hold {num_parameters} "
            "parameters. Download the complete folder of a T5."
        )


def check(path: Any, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compares names and shapes, both as the file has them.

    Raises:
      InvalidWeights: parameters are missing, extra or misshapen; all of them are named.
    """
    if problems := differences(expected, found):
        raise InvalidWeights(
            f"{path}: {len(problems)} parameters differ from those of its configuration: "
            f"{'; '.join(problems)}. Download the complete folder of a T5."
        )


def describe(params: Mapping[str, Any], t5: T5Config) -> str:
    """A description of the parameters of a checkpoint, for the log."""
    count = sum(leaf.size for leaf in flax.traverse_util.flatten_dict(params).values())
    return (
        f"{count:,} parameters, {t5.num_encoder_layers} and {t5.num_decoder_layers} layers of width "
        f"{t5.emb_dim}, {t5.mlp_activations}, output layer {'tied' if t5.tie_output else 'untied'}"
    )


def float32(array: Any) -> ts.TensorStore:
    """A numpy array or a TensorStore as a TensorStore of float32, which reads nothing yet."""
    store = array if isinstance(array, ts.TensorStore) else ts.array(np.asarray(array))
    return store if store.dtype == ts.float32 else ts.cast(store, ts.float32)


@functools.lru_cache(maxsize=16)
def _tree(config: GlimmerConfig) -> dict[str, Any]:
    return GlimmerModel(unrolled(config)).abstract_variables()[0]


def _public(name: str, tree: Mapping[str, Any]) -> str:
    divided = "memory_encoder" in tree or "live_a" in tree["live_encoder"]
    if name.startswith("live_encoder/") and not divided:
        return f"encoder/{name.removeprefix('live_encoder/').removeprefix('live_b/')}"
    return name


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")
