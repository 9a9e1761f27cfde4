"""The optimiser of a run: trained parameters, learning rate, and the sharding of its state.

Frozen parameters are removed from the tree first: they have no gradients, no moments and no updates.
Codebooks are updated apart from the others (`training.codebooks`): their "gradients" are no gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from glimmer_jax import axes, partitioning
from glimmer_jax.training import codebooks
from glimmer_jax.training.adafactor import adafactor, adafactor_names
from glimmer_jax.training.schedule import Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser and learning rate. The defaults of Adafactor are T5X's."""

    name: str = "adafactor"  # adafactor or adamw
    learning_rate: float = 1e-3  # adafactor: relative to each parameter's RMS
    schedule: str = (
        "constant"  # constant, rsqrt (rate / sqrt(step)) or linear (to 0 at decay_steps)
    )
    warmup_steps: int = 0  # updates
    decay_steps: int = 0  # updates until the end of a linear schedule
    max_grad_norm: float | None = None  # clips gradients to this global norm
    # Adafactor
    decay_rate: float = 0.8
    clipping_threshold: float | None = 1.0  # RMS of an update
    multiply_by_parameter_scale: bool = True
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    min_dim_size_to_factor: int = 128
    momentum: float | None = None
    # AdamW
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # multiplied by the learning rate

    def __post_init__(self):
        if self.name not in ("adafactor", "adamw"):
            raise ValueError(f"Optimizer must be 'adafactor' or 'adamw', got {self.name!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ValueError(
                f"warmup_steps and decay_steps must be at least 0, got {self.warmup_steps} and "
                f"{self.decay_steps}."
            )
        if self.weight_decay and self.name != "adamw":
            raise ValueError(
                "weight_decay is supported by adamw only: set it to 0, or name='adamw'."
            )
        self.make_schedule()

    def make_schedule(self) -> Schedule:
        """The learning rate as a function of the step."""
        return make_schedule(self.schedule, self.learning_rate, self.warmup_steps, self.decay_steps)

    def schedule_end(self) -> int | None:
        """The update at which the learning rate reaches 0, or None if it never does."""
        return self.decay_steps if self.schedule == "linear" else None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation of the trained parameters; see `make_optimizer`."""

    transformation: optax.GradientTransformation
    learning_rate: Schedule
    names: dict[str, Any]  # tuple of dimension names of every parameter, including frozen ones
    frozen: frozenset[tuple[str, ...]]  # paths of parameters that are not trained
    trained_state_names: Callable[[Any], Any]  # shapes of the trained parameters -> names of state

    def split(self, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A tree of the parameters' structure -> (trained part, frozen part)."""
        frozen, trained = _split(tree, self.frozen)
        return trained, frozen

    def global_norm(self, grads: dict[str, Any]) -> jax.Array:
        """Norm of the gradients of the trained part, float32 scalar."""
        return global_norm(_split(grads, _of_codes(self.names))[1])

    def init(self, params: dict[str, Any]) -> Any:
        """The state before the first update. `params` includes frozen parameters."""
        return self.transformation.init(self.split(params)[0])

    def update(self, grads: dict[str, Any], opt_state: Any, params: dict[str, Any]):
        """One update -> (all parameters, state). `grads` has the trained part only."""
        trained, frozen = self.split(params)
        updates, opt_state = self.transformation.update(grads, opt_state, trained)
        return merge(optax.apply_updates(trained, updates), frozen), opt_state

    def state_names(self, shapes: dict[str, Any]) -> Any:
        """Dimension names of the state's arrays for parameters of these shapes."""
        return self.trained_state_names(self.split(shapes)[0])


def merge(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `Optimizer.split`."""
    flat = flax.traverse_util.flatten_dict(trained) | flax.traverse_util.flatten_dict(frozen)
    return flax.traverse_util.unflatten_dict(flat)


def make_optimizer(
    config: OptimizerConfig, names: dict[str, Any], frozen: dict[str, Any] | None = None
) -> Optimizer:
    """The optimiser that `config` describes.

    Args:
      config: kind and learning rate.
      names: tree of tuples: the dimension names of every parameter.
      frozen: tree of bool, True where a parameter is not trained; None trains all.

    Raises:
      ValueError: `frozen` and `names` are different trees, or everything is frozen.
    """
    flat_names = flax.traverse_util.flatten_dict(names)
    flat_frozen = flax.traverse_util.flatten_dict(frozen or {})
    if frozen is not None and flat_frozen.keys() != flat_names.keys():
        differing = sorted("/".join(p) for p in flat_frozen.keys() ^ flat_names.keys())
        raise ValueError(
            "`frozen` must have one bool for each parameter in `names`; only one of them has "
            f"{differing[:5]}."
        )
    frozen_paths = frozenset(path for path, is_frozen in flat_frozen.items() if is_frozen)
    trained_names = flax.traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat_names.items() if path not in frozen_paths}
    )
    of_codes = _of_codes(trained_names)
    _, trained_names = _split(trained_names, of_codes)
    if not trained_names:
        raise ValueError("Every parameter is frozen. Train at least one of them.")
    schedule = config.make_schedule()
    if config.name == "adafactor":
        transformation, state_names = _adafactor(config, schedule, trained_names)
    else:
        transformation, state_names = _adamw(config, schedule, trained_names)
    if config.max_grad_norm is not None:
        inner_names = state_names
        transformation = optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm), transformation
        )
        state_names = lambda shapes: (optax.EmptyState(), inner_names(shapes))  # noqa: E731
    if of_codes:
        transformation = _beside_codebooks(transformation, of_codes)
        names_of_others = state_names
        state_names = lambda shapes: names_of_others(_split(shapes, of_codes)[1])  # noqa: E731
    return Optimizer(transformation, schedule, names, frozen_paths, state_names)


def _of_codes(names: dict[str, Any]) -> frozenset[tuple[str, ...]]:
    """Paths of codebooks, which have a dimension of codes."""
    flat = flax.traverse_util.flatten_dict(names)
    return frozenset(path for path, dims in flat.items() if axes.CODE in dims)


def _split(
    tree: dict[str, Any], paths: frozenset[tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A nested dict -> (its part at `paths`, the rest)."""
    flat = flax.traverse_util.flatten_dict(tree)
    parts = ({p: x for p, x in flat.items() if (p in paths) == chosen} for chosen in (True, False))
    here, rest = (flax.traverse_util.unflatten_dict(part) for part in parts)
    return here, rest


def _beside_codebooks(
    transformation: optax.GradientTransformation, of_codes: frozenset[tuple[str, ...]]
) -> optax.GradientTransformation:
    """`transformation` for all parameters but the codebooks; its state is the only one."""

    def init(params: dict[str, Any]) -> Any:
        return transformation.init(_split(params, of_codes)[1])

    def update(grads: dict[str, Any], state: Any, params: dict[str, Any] | None = None):
        (sums, grads), (books, others) = (_split(x, of_codes) for x in (grads, params or {}))
        updates, state = transformation.update(grads, state, others)
        # The modules that hold codebooks.
        moved = {
            module: jax.tree.map(jnp.subtract, codebooks.follow(books[module], sums[module]), old)
            for module, old in books.items()
        }
        return merge(updates, moved), state

    return optax.GradientTransformation(init, update)


def _adafactor(config: OptimizerConfig, schedule: Schedule, names: dict[str, Any]):
    shared: dict[str, Any] = dict(
        min_dim_size_to_factor=config.min_dim_size_to_factor,
        momentum=config.momentum,
    )
    transformation = adafactor(
        schedule,
        names,
        decay_rate=config.decay_rate,
        clipping_threshold=config.clipping_threshold,
        multiply_by_parameter_scale=config.multiply_by_parameter_scale,
        epsilon1=config.epsilon1,
        epsilon2=config.epsilon2,
        **shared,
    )
    return transformation, lambda shapes: adafactor_names(names, shapes, **shared)


def _adamw(config: OptimizerConfig, schedule: Schedule, names: dict[str, Any]):
    transformation = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )

    def state_names(shapes: Any) -> Any:
        # Both moments have the shapes and names of the parameters; counters have none.
        return optax.tree.map_params(
            transformation,
            lambda _, leaf_names: leaf_names,
            jax.eval_shape(transformation.init, shapes),
            names,
            transform_non_params=lambda _: (),
            is_leaf=partitioning.is_names,
        )

    return transformation, state_names


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32 scalar."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))
