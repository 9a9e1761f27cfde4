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

import jax
import jax.numpy as jnp

DECAY = 0.999
# A code is moved if its frequency falls below this share of an even one.
RARE = 0.03
# Distance of a moved centroid from its neighbour, in standard deviations of a channel.
_APART = 0.01

Books = dict[str, jax.Array]


def follow(books: Books, sums: Books, decay: float = DECAY, rare: float = RARE) -> Books:
    """The codebooks after a step.

    Args:
      books: float32 `{"centroids": [G, C, S], "frequencies": [G, C]}`.
      sums: their "gradients" of `codecs.straight_through`. Without any token nothing changes.
      decay: d.
      rare: at most one code of each subspace is moved per step; 0 moves none.
    """
    one_subspace = functools.partial(_one_subspace, decay=decay, rare=rare)
    centroids, frequencies = jax.vmap(one_subspace)(
        books["centroids"], books["frequencies"], sums["centroids"], -sums["frequencies"]
    )
    return {"centroids": centroids, "frequencies": frequencies}


def _one_subspace(
    centroids_CS: jax.Array,
    frequencies_C: jax.Array,
    error_CS: jax.Array,
    counts_C: jax.Array,
    decay: float,
    rare: float,
) -> tuple[jax.Array, jax.Array]:
    total = counts_C.sum()
    share_C = jnp.where(total > 0, counts_C / jnp.maximum(total, 1), frequencies_C)
    new_C = decay * frequencies_C + (1 - decay) * share_C
    # A code without tokens has no error either, so that its quotient does not matter.
    step_CS = (1 - decay) * error_CS / jnp.maximum(total, 1) / jnp.maximum(new_C, 1e-12)[:, None]
    new_CS = centroids_CS - step_CS

    least, most = jnp.argmin(new_C), jnp.argmax(new_C)
    half = new_C[most] / 2
    moved_C = new_C.at[least].set(half).at[most].set(half)
    # In the direction in which the most frequent centroid moves: there are tokens on that side.
    away_S = jnp.where(step_CS[most] > 0, -_APART, _APART)
    moved_CS = new_CS.at[least].set(new_CS[most] + away_S)
    is_rare = (total > 0) & (new_C[least] < rare * new_C.sum() / len(new_C))
    return jnp.where(is_rare, moved_CS, new_CS), jnp.where(is_rare, moved_C, new_C)
