"""Codebooks that follow the encoder while it is trained (MEMORY-VQ, arXiv 2308.14903).

A centroid is the moving average of the tokens that were assigned to it (van den Oord et al., 2017,
"Neural Discrete Representation Learning", appendix A.1), not a parameter with a gradient: what
`codecs.straight_through` returns as gradients are sums over the batch's tokens. With n of N tokens
assigned to a code with centroid e and frequency f, and decay d,

    f <- d f + (1 - d) n / N
    e <- e - (1 - d) (n e - sum of the n tokens) / (N f)

which keeps e f, the average of the tokens' sums. A code that tokens no longer choose is moved beside
the most frequent one, and the two share its tokens from then on.
"""

import functools
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

DECAY = 0.999
# A code is moved if its frequency falls below this share of an even one.
RARE = 0.03
# Distance of a moved centroid from its neighbour, in standard deviations of a channel.
_APART = 0.01


def moving_average(decay: float = DECAY, rare: float = RARE) -> optax.GradientTransformation:
    """Updates trees of `{"centroids": [G, C, S], "frequencies": [G, C]}` from their assignments.

    A step whose batch has no tokens changes nothing. In each subspace at most one code is moved per
    step.
    """

    def update(sums: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        flat_params = flax.traverse_util.flatten_dict(params)
        updates = {}
        for path, error in flax.traverse_util.flatten_dict(sums).items():
            if path[-1] != "centroids":
                continue
            other = (*path[:-1], "frequencies")
            counts = -flax.traverse_util.flatten_dict(sums)[other]
            books = flat_params[path], flat_params[other]
            one_subspace = functools.partial(_one_subspace, decay=decay, rare=rare)
            new = jax.vmap(one_subspace)(*books, error, counts)
            for name, value, old in zip((path, other), new, books, strict=True):
                updates[name] = value - old
        return flax.traverse_util.unflatten_dict(updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _one_subspace(
    centroids_CS: jax.Array,
    frequencies_C: jax.Array,
    error_CS: jax.Array,
    counts_C: jax.Array,
    decay: float,
    rare: float,
) -> tuple[jax.Array, jax.Array]:
    total = jnp.maximum(counts_C.sum(), 1)
    share_C = jnp.where(counts_C.sum() > 0, counts_C / total, frequencies_C)
    new_C = decay * frequencies_C + (1 - decay) * share_C
    # A code without tokens has no error either, so that its quotient does not matter.
    step_CS = (1 - decay) * error_CS / total / jnp.maximum(new_C, 1e-12)[:, None]
    new_CS = centroids_CS - step_CS

    least, most = jnp.argmin(new_C), jnp.argmax(new_C)
    half = new_C[most] / 2
    moved_C = new_C.at[least].set(half).at[most].set(half)
    # In the direction in which the most frequent centroid moves: there are tokens on that side.
    away_S = jnp.where(step_CS[most] > 0, -_APART, _APART)
    moved_CS = new_CS.at[least].set(new_CS[most] + away_S)
    is_rare = new_C[least] < rare * new_C.sum() / len(new_C)
    return jnp.where(is_rare, moved_CS, new_CS), jnp.where(is_rare, moved_C, new_C)
