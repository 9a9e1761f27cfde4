"""The training state, and its placement on a mesh.

There is no random state. The dropout key of a step is `fold_in(key(seed), step)`, so that a resumed
run draws the same numbers as an uninterrupted one, on any mesh.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glimmer_jax import partitioning
from glimmer_jax.training.optimizer import Optimizer
from glimmer_jax.weights import parameters


@flax.struct.dataclass
class TrainState:
    """Number of updates done (int32 scalar), all parameters, and the optimiser's state."""

    step: Any
    params: Any
    opt_state: Any


def state_shardings(optimizer: Optimizer, shapes: Any, mesh: Mesh) -> TrainState:
    """NamedShardings of a state, from the names of the parameters.

    Args:
      optimizer: holds the names of the parameters and of its own state.
      shapes: the parameters, or their ShapeDtypeStructs.
      mesh: the devices.

    Raises:
      ValueError: a parameter does not divide evenly over the mesh.
    """
    partitioning.check_divisible(shapes, optimizer.names, mesh)
    return TrainState(
        step=partitioning.replicated(mesh),
        params=partitioning.shardings(optimizer.names, mesh),
        opt_state=partitioning.shardings(optimizer.state_names(shapes), mesh),
    )


def abstract_state(optimizer: Optimizer, shapes: Any, mesh: Mesh) -> TrainState:
    """ShapeDtypeStructs with shardings: the target for restoring a checkpoint."""
    shardings = state_shardings(optimizer, shapes, mesh)
    state = jax.eval_shape(lambda params: _first_state(params, optimizer), shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def init_state(make_params: Callable[[], Any], optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A state of random parameters. Each device computes its own slices: no host holds them all.

    Args:
      make_params: traceable; returns the parameters, for example
        `lambda: model.init_params(jax.random.key(0))`.
      optimizer: that of the run.
      mesh: the devices.
    """
    shardings = state_shardings(optimizer, jax.eval_shape(make_params), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(lambda: _first_state(make_params(), optimizer), out_shardings=shardings)()


def state_from_params(params: Any, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A state at step 0 with given parameters, from `weights.parameters`, placed on the mesh.

    Raises:
      ValueError: the parameters' tree is not that of the optimiser, or a number is not finite.
    """
    differing = sorted(_paths(params) ^ _paths(optimizer.names))
    if differing:
        raise ValueError(
            "The parameters are not those of the model; only one of the two has "
            f"{', '.join(differing[:6])}{' ...' if len(differing) > 6 else ''}. Load a checkpoint "
            "of the same configuration, or recut it."
        )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    shardings = state_shardings(optimizer, shapes, mesh)
    # No aliases: the step donates its state, but not the caller's arrays.
    params = parameters.put(params, shardings.params)
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return TrainState(step=step, params=params, opt_state=opt_state)


def _first_state(params: Any, optimizer: Optimizer) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _paths(tree: Any) -> set[str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=partitioning.is_names)
    return {"/".join(str(key.key) for key in path) for path, _ in flat}
