"""The teacher of perplexity distillation: how probable the answer is by each passage alone (Atlas)."""

from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax import axes, losses
from glimmer_jax.models.glimmer import Batch, Glimmer
from glimmer_jax.models.selection import Live
from glimmer_jax.partitioning import constrain, parts_in_scope


def answer_log_likelihoods(
    module: Glimmer, params: Any, batch: Batch, live: Live, *, chunk: int, mean: bool
) -> jax.Array:
    """log p(answer | passage k alone), float32 `[B, K]`, without gradient or dropout.

    The reader is run on every passage by itself, from the states that Live-A has left.

    Args:
      module: the model.
      params: its parameters.
      batch: with targets; see `models.model`.
      live: what Live-A has left.
      chunk: passages whose logits a device has at one time: all at once would be `[B, K, T, V]`.
      mean: log p a token instead of an answer.
    """
    params, states, mask = jax.lax.stop_gradient((params, live.states, live.mask))
    ways = parts_in_scope(axes.PASSAGES)
    variables = {"params": params}

    def one(passages):
        states_BJND, mask_BJN = passages
        encoded = module.apply(variables, states_BJND, mask_BJN, method="read")

        def each(x_BT):
            return jnp.broadcast_to(x_BT[:, None], (len(x_BT), ways, *x_BT.shape[1:]))

        tokens = each(batch["decoder_input_tokens"])
        logits = module.apply(variables, encoded, mask_BJN, tokens, method="decode")
        return losses.log_likelihood(
            logits,
            each(batch["decoder_target_tokens"]),
            each(batch["decoder_loss_weights"]),
            mean=mean,
        )

    def turns(x):
        """`[B, K, ...]` -> `[K / J, B, J, ...]`: one passage of each of the J devices."""
        x = x.reshape(x.shape[0], ways, -1, *x.shape[2:])
        x = jnp.moveaxis(x, 2, 0)
        names = (None, axes.BATCH, axes.PASSAGES, *(None,) * (x.ndim - 3))
        return constrain(x, names)

    by_turn = (turns(states), turns(mask))
    found = jax.lax.map(one, by_turn, batch_size=min(chunk, len(by_turn[1])))
    return jnp.moveaxis(found, 0, 2).reshape(mask.shape[:2])
