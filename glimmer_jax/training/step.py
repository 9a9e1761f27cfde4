"""One training step as a pure function: loss, gradient, update."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.training.optimizer import Optimizer, merge
from glimmer_jax.training.state import TrainState

Sums = dict[str, tuple[jax.Array, jax.Array]]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


class Model(Protocol):
    """The methods of a T5X model class that training uses."""

    def loss_fn(
        self, params: Any, batch: Any, dropout_rng: Any, normalizers: Any = None
    ) -> tuple[jax.Array, Sums]: ...

    def loss_normalizers(self, batch: Any) -> Any: ...


def make_train_step(
    model: Model, optimizer: Optimizer, num_microbatches: int = 1, seed: int = 0
) -> TrainStep:
    """`train_step(state, batch) -> (state, metrics)`.

    Metrics are the float32 scalars `loss`, `grad_norm` (of the trained parameters), `learning_rate` and
    `skipped`, and `sums`, the model's own `{name: (total, weight)}`, summed over the batch. If the loss
    or the gradient is not finite, `skipped` is 1 and only the step counter changes.

    Args:
      model: computes the loss and its denominators.
      optimizer: holds the names of trained and frozen parameters.
      num_microbatches: number of sequential parts of a batch. The loss of every part is divided by
        the denominators of the entire batch, so that the gradients of the parts sum to the gradient
        of the batch.
      seed: of dropout, together with the step.
    """

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        trained, frozen = optimizer.split(state.params)
        normalizers = model.loss_normalizers(batch)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_and_grads(part: Any, key: jax.Array):
            def loss_fn(trained):
                return model.loss_fn(merge(trained, frozen), part, key, normalizers)

            (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
            return loss, sums, _constrain_like_params(grads, optimizer)

        loss, sums, grads = accumulate(loss_and_grads, batch, step_key, num_microbatches)
        grad_norm = optimizer.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updated = optimizer.update(grads, state.opt_state, state.params)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state)
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": 1.0 - finite,
            "learning_rate": jnp.asarray(optimizer.learning_rate(state.step), jnp.float32),
            "sums": sums,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def accumulate(
    fn: Callable[[Any, jax.Array], Any], batch: Any, key: jax.Array, num_microbatches: int
) -> Any:
    """Sum of `fn(part, key of the part)` over the parts of a batch, one part at a time.

    Part i holds the rows i, i + n, i + 2n, ..., so that every device slices its own rows.
    """
    if num_microbatches == 1:
        return fn(batch, key)

    def parts(x: jax.Array) -> jax.Array:
        x = jnp.reshape(x, (x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]))
        x = jnp.swapaxes(x, 0, 1)
        return partitioning.constrain(x, (None, axes.BATCH, *(partitioning.FREE,) * (x.ndim - 2)))

    def body(total: Any, part_and_index: Any) -> tuple[Any, None]:
        part, index = part_and_index
        return jax.tree.map(jnp.add, total, fn(part, jax.random.fold_in(key, index))), None

    stacked = jax.tree.map(parts, batch)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], stacked), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (stacked, jnp.arange(num_microbatches)))
    return total


def jit_train_step(train_step: TrainStep, shardings: TrainState, mesh: Mesh) -> TrainStep:
    """The step compiled for a mesh. It donates the buffers of the old state.

    Args:
      train_step: from `make_train_step`.
      shardings: from `state_shardings`.
      mesh: call the result inside `jax.set_mesh(mesh)`.
    """
    return jax.jit(
        train_step,
        # A batch keeps the sharding of `put_batch`.
        in_shardings=(shardings, None),
        out_shardings=(shardings, partitioning.replicated(mesh)),
        donate_argnums=0,
    )


def _constrain_like_params(grads: Any, optimizer: Optimizer) -> Any:
    # Without this, XLA could replicate the accumulated gradient, which starts as unnamed zeros.
    trained_names, _ = optimizer.split(optimizer.names)
    return jax.tree.map(
        lambda names, grad: partitioning.constrain(grad, names),
        trained_names,
        grads,
        is_leaf=partitioning.is_names,
    )
