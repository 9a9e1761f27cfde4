"""The teacher of perplexity distillation (Atlas): the answer's likelihood given one passage."""

from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax import axes, losses
from glimmer_jax.models.glimmer import Batch, Glimmer
from glimmer_jax.models.selection import Live
from glimmer_jax.partitioning import constrain, parts_in_scope


def answer_log_likelihoods(
    module: Glimmer, params: Any, batch: Batch, live: Live, *, chunk: int
) -> jax.Array:
    """log p(answer | passage k alone), float32 `[B, K]`, without gradient or dropout.

    Runs Live-B and the decoder on every passage separately, starting from the states after Live-A.

    Args:
      module: the model.
      params: its parameters.
      batch: with targets; see `models.model`.
      live: states after Live-A.
      chunk: passages per device whose logits exist at the same time; those of all passages would
        take `[B, K, T, V]`.
    """
    params, states, mask = jax.lax.stop_gradient((params, live.states, live.mask))
    shards = parts_in_scope(axes.PASSAGES)
    variables = {"params": params}

    def log_likelihoods(passages):
        states_BJND, mask_BJN = passages
        encoded = module.apply(variables, states_BJND, mask_BJN, method="read")

        def per_passage(x_BT):
            return jnp.broadcast_to(x_BT[:, None], (len(x_BT), shards, *x_BT.shape[1:]))

        tokens = per_passage(batch["decoder_input_tokens"])
        logits = module.apply(variables, encoded, mask_BJN, tokens, method="decode")
        return losses.log_likelihood(
            logits,
            per_passage(batch["decoder_target_tokens"]),
            per_passage(batch["decoder_loss_weights"]),
        )

    def by_shard(x):
        """`[B, K, ...]` -> `[K / J, B, J, ...]`: one passage from each of J shards."""
        x = x.reshape(x.shape[0], shards, -1, *x.shape[2:])
        x = jnp.moveaxis(x, 2, 0)
        names = (None, axes.BATCH, axes.PASSAGES, *(None,) * (x.ndim - 3))
        return constrain(x, names)

    passages = (by_shard(states), by_shard(mask))
    result = jax.lax.map(log_likelihoods, passages, batch_size=min(chunk, len(passages[1])))
    return jnp.moveaxis(result, 0, 2).reshape(mask.shape[:2])
