"""An initialisation from which small models learn to match, select and copy within minutes.

From T5's random initialisation a small model needs thousands of examples to learn that equal tokens
should attend to each other. Here

* queries equal keys, so that attention prefers equal tokens;
* the output projection is the transpose of the value projection, so that attended states are added to
  the residual stream unchanged;
* the output layer is the transpose of the embedding;
* two encoder heads attend to the previous and the next token, and one attends far back: in a live
  sequence, to the question. It marks the title of a passage that matches, which tells the decoder
  which of several passages to read;
* decoder heads attend to the last few tokens, so that copying survives repeated words.

After "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828), but
value times output projection is +I instead of -I.
"""

from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]

# Initial position bias of a head towards its positions, in nats.
POSITION_BIAS = 4.0
# Scale of token similarity in the head that attends far back, where position dominates.
FAR_SIMILARITY = 0.3


def mimetic_init(params: Params, config: T5Config) -> Params:
    """Applies the initialisation to random parameters of any cut. Traceable.

    Raises:
      ValueError: fewer than three heads or eight position buckets.
    """
    if config.num_heads < 3 or config.relpos_buckets < 8:
        raise ValueError(
            "Mimetic initialisation needs num_heads >= 3 and relpos_buckets >= 8, got "
            f"{config.num_heads} and {config.relpos_buckets}. Use the random initialisation."
        )
    params = {
        name: _attentions(part, config, far_head=name != "decoder") for name, part in params.items()
    }
    embedding = params["token_embedder"]["embedding"]
    if not config.tie_output:
        output = {"kernel": embedding.T / jnp.sqrt(float(config.emb_dim))}
        params["decoder"] = {**params["decoder"], "logits_dense": output}
    for stack in ("memory_encoder", "question_encoder", "live_encoder"):
        if "relpos_bias" in params.get(stack, {}):
            table = params[stack]["relpos_bias"]["rel_embedding"]
            table = _add_position_bias(table, config.relpos_buckets)
            params[stack] = {**params[stack], "relpos_bias": {"rel_embedding": table}}
    # The next token to copy depends on the last few: decoder heads attend one, two, three back.
    table = params["decoder"]["relpos_bias"]["rel_embedding"]
    for back in range(1, min(len(table), config.relpos_buckets)):
        table = table.at[back - 1, back].add(POSITION_BIAS)
    params["decoder"] = {**params["decoder"], "relpos_bias": {"rel_embedding": table}}
    return params


def _add_position_bias(table: jax.Array, num_buckets: int) -> jax.Array:
    """`[H, buckets]`: the first head attends one back, the second one ahead, the last far back."""
    half = num_buckets // 2  # buckets of keys before the query, then of keys after it
    table = table.at[0, 1].add(POSITION_BIAS)
    table = table.at[1, half + 1].add(POSITION_BIAS)
    # From the first logarithmic bucket on: at least eight tokens, with T5's 32 buckets.
    return table.at[-1, half // 2 : half].add(POSITION_BIAS)


def _attentions(tree: Any, config: T5Config, far_head: bool) -> Any:
    if not isinstance(tree, dict):
        return tree
    if not {"query", "key", "value", "out"} <= tree.keys():
        return {name: _attentions(child, config, far_head) for name, child in tree.items()}
    key, value = tree["key"]["kernel"], _orthogonal(tree["value"]["kernel"])
    # T5 scales queries instead of logits.
    query = key / jnp.sqrt(float(config.head_dim))
    if far_head:
        query = query.at[..., -config.head_dim :].multiply(FAR_SIMILARITY)
    return {
        **tree,
        "query": {"kernel": query},
        "value": {"kernel": value},
        "out": {"kernel": jnp.swapaxes(value, -1, -2)},
    }


def _orthogonal(kernel: jax.Array) -> jax.Array:
    """Orthonormal columns, or rows if there are more columns, from a kernel `[..., D, H*C]`."""
    rows, columns = kernel.shape[-2:]
    if rows < columns:
        return jnp.swapaxes(_orthogonal(jnp.swapaxes(kernel, -1, -2)), -1, -2)
    return jnp.linalg.qr(kernel)[0]
