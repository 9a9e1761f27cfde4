"""Parameters from a file for a given model: checked, recut and placed on devices."""

import logging
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding

from glimmer_jax import partitioning
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.weights import lazy_arrays, t5_names
from glimmer_jax.weights.file_errors import check_finite
from glimmer_jax.weights.load import Loaded
from glimmer_jax.weights.load import load as load_weights

_logger = logging.getLogger(__name__)


def load(path: Any, model: GlimmerModel, vocabulary_fingerprint: str) -> dict[str, Any]:
    """Parameters for `model` from any path that `weights.load` reads; logs a description of them.

    Parameters of another cut of the same sizes are recut. A checkpoint without a configuration must
    hold the parameters of `model`. Leaves may be TensorStores, which have read nothing yet; `place`
    and `put` read them.

    Raises:
      OSError: the storage failed or denied access.
      ValueError: no checkpoint, damaged, of another vocabulary, or of other sizes.
    """
    return fit(load_weights(path), path, model, vocabulary_fingerprint)


def fit(
    loaded: Loaded, path: Any, model: GlimmerModel, vocabulary_fingerprint: str
) -> dict[str, Any]:
    """The parameters that were opened at `path` for `model`; see `load`."""
    if jax.process_index() == 0:
        _logger.info("Parameters: %s.", loaded.what)
    theirs = loaded.vocabulary_fingerprint
    if theirs is not None and theirs != vocabulary_fingerprint:
        raise ValueError(
            f"VOCABULARY has the fingerprint {vocabulary_fingerprint}, but checkpoint {path} was "
            f"trained with {theirs}. Set VOCABULARY to the checkpoint's vocabulary."
        )
    params = loaded.params
    if loaded.config is not None:
        params = recut(params, loaded.config, model.config)
    shapes, _ = model.abstract_variables()
    problems = t5_names.differences(_flat_shapes(shapes), _flat_shapes(params))
    listed = f"{len(problems)} parameters differ: {'; '.join(problems)}"
    if problems and loaded.config is None:
        raise ValueError(
            f"Checkpoint {path} does not record its model configuration, and {listed}. Give the gin "
            "files that it was trained with. To use it as another cut, export it with these gin files "
            "first (--run_mode=export)."
        )
    if problems:
        remedy = "Download or write it again."
        if all("memory_codebooks/" in problem for problem in problems):
            remedy = "Learn its codebooks again: --run_mode=codebooks."
        raise ValueError(f"Checkpoint {path} does not match its model_config: {listed}. {remedy}")
    return params


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def read(params: Any) -> Any:
    """Parameters in host memory, as numpy arrays.

    Raises:
      InvalidWeights: a parameter is damaged or not finite.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: lazy_arrays.read(_name(path), x), params
    )


def place(params: Any, model: GlimmerModel, mesh: Mesh) -> Any:
    """The parameters on the mesh, in the shardings of the model; see `put`."""
    shapes, names = model.abstract_variables()
    partitioning.check_divisible(shapes, names, mesh)
    return put(params, partitioning.shardings(names, mesh))


def put(params: Any, shardings: Any) -> Any:
    """Parameters on devices, in float32. The result does not alias `params`.

    Each process reads the slices of its own devices from a TensorStore, each slice once and one
    parameter after another, so that no host ever holds all parameters.

    Args:
      params: tree of numpy arrays, JAX arrays or TensorStores.
      shardings: tree of NamedShardings.

    Raises:
      InvalidWeights: a parameter that was read from a file is not finite.
    """
    return jax.tree_util.tree_map_with_path(_put, params, shardings)


def _put(path: Any, leaf: Any, sharding: NamedSharding) -> jax.Array:
    name = _name(path)
    if not isinstance(leaf, ts.TensorStore):
        if isinstance(leaf, np.ndarray):
            check_finite(name, leaf)
        return jax.device_put(leaf, sharding, may_alias=False)
    slices: dict[str, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        # Replicas on this host share one read.
        if str(index) not in slices:
            slices[str(index)] = lazy_arrays.read(name, leaf[index])
        return slices[str(index)]

    shape = tuple(leaf.shape)
    pieces = [
        jax.device_put(piece(index), device, may_alias=False)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    array = jax.make_array_from_single_device_arrays(shape, sharding, pieces)
    return jax.block_until_ready(array)


def _name(path: Any) -> str:
    return "/".join(str(key.key) for key in path)
