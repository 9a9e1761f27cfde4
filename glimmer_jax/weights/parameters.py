"""Parameters from a file, for the model at hand: checked, recut, placed."""

from typing import Any

import flax.traverse_util
import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding

from glimmer_jax import partitioning
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.load import Loaded
from glimmer_jax.weights.load import load as load_weights


def load(path: Any, model: GlimmerModel, vocabulary_fingerprint: str) -> dict[str, Any]:
    """Parameters for `model` from any of the places of `weights.load`; prints what was found.

    Those of another cut of the same sizes are recut; a checkpoint that does not say which model it
    holds must be `model`'s. Leaves may be TensorStores, which have read nothing yet: `place` and `put`
    bring them to the devices.

    Raises:
      OSError: the storage did not answer, or refused.
      ValueError: no checkpoint there, damaged, of another vocabulary, or of other sizes.
    """
    return fit(load_weights(path), path, model, vocabulary_fingerprint)


def fit(
    loaded: Loaded, path: Any, model: GlimmerModel, vocabulary_fingerprint: str
) -> dict[str, Any]:
    """What was opened at `path`, as `load` gives it and with its errors."""
    if jax.process_index() == 0:
        print(f"Parameters: {loaded.what}.", flush=True)
    theirs = loaded.vocabulary_fingerprint
    if theirs is not None and theirs != vocabulary_fingerprint:
        raise ValueError(
            f"Checkpoint {path} was trained with vocabulary {theirs}, and the vocabulary given is "
            f"{vocabulary_fingerprint}. Give the checkpoint's vocabulary."
        )
    params = loaded.params
    if loaded.config is not None:
        params = recut(params, loaded.config, model.config)
    shapes, _ = model.abstract_variables()
    problems = t5_names.differences(_flat_shapes(shapes), _flat_shapes(params))
    listed = f"{len(problems)} parameters differ: {'; '.join(problems)}"
    if problems and loaded.config is None:
        raise ValueError(
            f"Checkpoint {path} does not say which model it holds, and its parameters are not those "
            f"of the model given; {listed}. Give the gin files that it was trained with; "
            "--run_mode=export with those writes a file of which any cut is made."
        )
    if problems:
        raise ValueError(
            f"The parameters of {path} are not those that their model_config promises; {listed}. "
            "Fetch or write the checkpoint again."
        )
    return params


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def place(params: Any, model: GlimmerModel, mesh: Mesh) -> Any:
    """The parameters on the mesh, as `put` brings them there."""
    shapes, names = model.abstract_variables()
    partitioning.check_divisible(shapes, names, mesh)
    return put(params, partitioning.shardings(names, mesh))


def put(params: Any, shardings: Any) -> Any:
    """Parameters on devices, float32, without aliases of what is given.

    Of a TensorStore every process reads the slices of its own devices, each once, and one parameter
    after another: no host ever holds them all.

    Args:
      params: tree of numpy arrays, JAX arrays or TensorStores.
      shardings: tree of NamedShardings.
    """
    return jax.tree.map(_put, params, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if not isinstance(leaf, ts.TensorStore):
        return jax.device_put(leaf, sharding, may_alias=False)
    read: dict[str, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        # Replicas on this host share what is read.
        if str(index) not in read:
            read[str(index)] = leaf[index].read().result()
        return read[str(index)]

    shape = tuple(leaf.shape)
    pieces = [
        jax.device_put(piece(index), device, may_alias=False)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    ]
    array = jax.make_array_from_single_device_arrays(shape, sharding, pieces)
    return jax.block_until_ready(array)
