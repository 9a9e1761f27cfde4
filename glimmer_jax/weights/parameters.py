"""Parameters from a file, for the model at hand: checked, recut, placed."""

from typing import Any

import jax
from jax.sharding import Mesh

from glimmer_jax import partitioning
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.weights.load import load as load_weights


def load(path: Any, model: GlimmerModel, vocabulary_fingerprint: str) -> dict[str, Any]:
    """Parameters for `model` from any of the places of `weights.load`; prints what was found.

    Those of another cut of the same sizes are recut.

    Raises:
      ValueError: no checkpoint there, damaged, of another vocabulary, or of other sizes.
    """
    loaded = load_weights(path)
    if jax.process_index() == 0:
        print(f"Parameters: {loaded.what}.", flush=True)
    theirs = loaded.vocabulary_fingerprint
    if theirs is not None and theirs != vocabulary_fingerprint:
        raise ValueError(
            f"Checkpoint {path} was trained with vocabulary {theirs}, and the vocabulary given is "
            f"{vocabulary_fingerprint}. Give the checkpoint's vocabulary."
        )
    if loaded.config is None:
        raise ValueError(
            f"Checkpoint {path} does not say which model it holds (no model_config). Use one that "
            "--run_mode=train or --run_mode=export has written."
        )
    params = recut(loaded.params, loaded.config, model.config)
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
