"""A start from which a small model learns to match and to copy within minutes.

From T5's random parameters a small model must first find out that equal tokens should attend to each
other, which takes thousands of examples. Here that is where it begins: queries equal keys, so that
attention looks at equal tokens; values come back through their own transpose, so that what is
attended to is added to the stream as it is; the output layer is the embedding's transpose; and two
heads of each encoder look at the token before and the token after. After "Mimetic Initialization of
Self-Attention Layers" (arXiv 2305.09828), with the signs that reading wants.
"""

from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]

# Nats by which a head prefers a neighbour at the start.
NEIGHBOUR_BIAS = 4.0


def matching_start(params: Params, config: T5Config) -> Params:
    """Fresh parameters of any cut, rearranged; shapes and dtypes stay. Traceable.

    Raises:
      ValueError: there are not two heads, or the position table has no bucket for each neighbour.
    """
    if config.num_heads < 2 or config.relpos_buckets < 8:
        raise ValueError(
            f"A matching start gives one head to each neighbour: it needs num_heads >= 2 and "
            f"relpos_buckets >= 8, got {config.num_heads} and {config.relpos_buckets}. Start without it."
        )
    params = _attentions(params, config)
    embedding = params["token_embedder"]["embedding"]
    if not config.tie_output:
        output = {"kernel": embedding.T / jnp.sqrt(float(config.emb_dim))}
        params["decoder"] = {**params["decoder"], "logits_dense": output}
    for stack in ("memory_encoder", "question_encoder", "live_encoder"):
        if "relpos_bias" in params.get(stack, {}):
            table = params[stack]["relpos_bias"]["rel_embedding"]
            # Distances -1 and +1 have the second bucket of each half (relative_position.buckets).
            table = table.at[0, 1].add(NEIGHBOUR_BIAS)
            table = table.at[1, config.relpos_buckets // 2 + 1].add(NEIGHBOUR_BIAS)
            params[stack] = {**params[stack], "relpos_bias": {"rel_embedding": table}}
    return params


def _attentions(tree: Any, config: T5Config) -> Any:
    if not isinstance(tree, dict):
        return tree
    if not {"query", "key", "value", "out"} <= tree.keys():
        return {name: _attentions(child, config) for name, child in tree.items()}
    key, value = tree["key"]["kernel"], _orthogonal(tree["value"]["kernel"])
    return {
        **tree,
        # The scale that T5 gives to queries, in place of one in the logits.
        "query": {"kernel": key / jnp.sqrt(float(config.head_dim))},
        "value": {"kernel": value},
        "out": {"kernel": jnp.swapaxes(value, -1, -2)},
    }


def _orthogonal(kernel: jax.Array) -> jax.Array:
    """The nearest thing to a rotation with the kernel's shape `[..., D, H*C]`."""
    rows, columns = kernel.shape[-2:]
    if rows < columns:
        return jnp.swapaxes(_orthogonal(jnp.swapaxes(kernel, -1, -2)), -1, -2)
    return jnp.linalg.qr(kernel)[0]
