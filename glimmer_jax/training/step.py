"""One training step: loss, gradient, update. Pure, and the only thing that runs on the devices."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glimmer_jax import axes, partitioning
from glimmer_jax.training.optimizer import Optimizer, global_norm, merge
from glimmer_jax.training.state import TrainState

Sums = dict[str, tuple[jax.Array, jax.Array]]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


class Model(Protocol):
    """The part of the T5X-style model class that training uses."""

    def loss_fn(
        self, params: Any, batch: Any, dropout_rng: Any, normalizers: Any = None
    ) -> tuple[jax.Array, Sums]: ...

    def loss_normalizers(self, batch: Any) -> Any: ...


def make_train_step(
    model: Model, optimizer: Optimizer, num_microbatches: int = 1, seed: int = 0
) -> TrainStep:
    """`train_step(state, batch) -> (state, metrics)`.

    Metrics are float32 scalars `loss` (of the whole batch), `grad_norm` (of what is trained),
    `learning_rate` and `skipped`, and `sums`, the model's own `{name: (total, weight)}` added over the
    batch. Where loss or gradient are not finite, `skipped` is 1, only the step is counted, and
    parameters and optimiser state stay as they were.

    Args:
      model: gives the loss and its denominators.
      optimizer: what is trained, and how.
      num_microbatches: the batch goes through in so many parts, one after the other. Every part's
        loss is divided by the denominators of the whole batch, so that the parts' gradients add
        up to the gradient of the undivided batch.
      seed: of dropout; with the step it determines every draw.
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
        grad_norm = global_norm(grads)
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
    """Sum of `fn(part, key of the part)` over the parts of a batch, one part in memory at a time.

    Part i holds the rows i, i + n, i + 2n, ...: each device cuts its own rows, and none travel.
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
    """The step compiled for a mesh; the old state's buffers are given to the new one.

    Args:
      train_step: from `make_train_step`.
      shardings: from `state_shardings`; the state keeps them.
      mesh: call the result inside `jax.set_mesh(mesh)`.
    """
    return jax.jit(
        train_step,
        # A batch lies as `put_batch` has laid it.
        in_shardings=(shardings, None),
        out_shardings=(shardings, partitioning.replicated(mesh)),
        donate_argnums=0,
    )


def _constrain_like_params(grads: Any, optimizer: Optimizer) -> Any:
    # Without this the accumulated gradient, born as unnamed zeros, could be replicated.
    trained_names, _ = optimizer.split(optimizer.names)
    return jax.tree.map(
        lambda names, grad: partitioning.constrain(grad, names),
        trained_names,
        grads,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
