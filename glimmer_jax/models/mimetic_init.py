"""A start from which a small model learns to match, to choose and to copy within minutes.

From T5's random parameters a small model must first find out that equal tokens should attend to each
other, which takes thousands of examples. Here that is where it begins: queries equal keys, so that
attention looks at equal tokens; values come back through their own transpose, so that what is
attended to is added to the stream as it is; the output layer is the embedding's transpose; two
heads of each encoder look at the token before and the token after; one looks far back, in a live
sequence at the question, so that a passage's title learns how well the passage matched (without it
the decoder cannot tell among several kept passages which one to read); and the decoder's heads look
at the last few tokens, so that copying survives a title that repeats itself. After "Mimetic
Initialization of Self-Attention Layers" (arXiv 2305.09828), with the signs that reading wants.
"""

from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]

# Nats by which a head prefers its places at the start.
PLACE_BIAS = 4.0
# What is left of the likeness of tokens in the head that looks far back: place comes first there.
FAR_LIKENESS = 0.3


def mimetic_init(params: Params, config: T5Config) -> Params:
    """Fresh parameters of any cut, rearranged; shapes and dtypes stay. Traceable.

    Raises:
      ValueError: there are not three heads, or the position table has no bucket for each neighbour.
    """
    if config.num_heads < 3 or config.relpos_buckets < 8:
        raise ValueError(
            "A matching start gives one head to each neighbour and one to what is far back: it needs "
            f"num_heads >= 3 and relpos_buckets >= 8, got {config.num_heads} and "
            f"{config.relpos_buckets}. Start without it."
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
            table = _places(params[stack]["relpos_bias"]["rel_embedding"], config.relpos_buckets)
            params[stack] = {**params[stack], "relpos_bias": {"rel_embedding": table}}
    # What to copy next depends on the last few tokens: heads of the decoder look one, two, three back.
    table = params["decoder"]["relpos_bias"]["rel_embedding"]
    for back in range(1, min(len(table), config.relpos_buckets)):
        table = table.at[back - 1, back].add(PLACE_BIAS)
    params["decoder"] = {**params["decoder"], "relpos_bias": {"rel_embedding": table}}
    return params


def _places(table: jax.Array, num_buckets: int) -> jax.Array:
    """`[H, buckets]`: the first head looks one back, the second one ahead, the last far back."""
    half = num_buckets // 2  # the first half is of keys before the query, the second of keys after
    table = table.at[0, 1].add(PLACE_BIAS)
    table = table.at[1, half + 1].add(PLACE_BIAS)
    # From the first logarithmic bucket on: eight tokens or more, with T5's 32 buckets.
    return table.at[-1, half // 2 : half].add(PLACE_BIAS)


def _attentions(tree: Any, config: T5Config, far_head: bool) -> Any:
    if not isinstance(tree, dict):
        return tree
    if not {"query", "key", "value", "out"} <= tree.keys():
        return {name: _attentions(child, config, far_head) for name, child in tree.items()}
    key, value = tree["key"]["kernel"], _orthogonal(tree["value"]["kernel"])
    # The scale that T5 gives to queries, in place of one in the logits.
    query = key / jnp.sqrt(float(config.head_dim))
    if far_head:
        query = query.at[..., -config.head_dim :].multiply(FAR_LIKENESS)
    return {
        **tree,
        "query": {"kernel": query},
        "value": {"kernel": value},
        "out": {"kernel": jnp.swapaxes(value, -1, -2)},
    }


def _orthogonal(kernel: jax.Array) -> jax.Array:
    """The nearest thing to a rotation with the kernel's shape `[..., D, H*C]`."""
    rows, columns = kernel.shape[-2:]
    if rows < columns:
        return jnp.swapaxes(_orthogonal(jnp.swapaxes(kernel, -1, -2)), -1, -2)
    return jnp.linalg.qr(kernel)[0]
