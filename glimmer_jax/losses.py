"""Losses as pure functions, with one value per token or per question; the caller averages.

Cross-entropy with z-loss as in T5X; perplexity distillation as in Atlas (arXiv 2208.03299, section
2.2) and GLIMMER (arXiv 2306.10231); supervised reranking where gold passages are known.
"""

import jax
import jax.numpy as jnp

KL_DIRECTIONS = ("lm_to_rank", "rank_to_lm")


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and squared log-normaliser (z) of each token.

    Args:
      logits: float32 `[..., T, V]`.
      targets: int32 `[..., T]`.

    Returns:
      float32 `[..., T]` twice, in nats and nats squared.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - chosen, jnp.square(log_z)


def log_likelihood(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """log p(target), summed over target tokens.

    Args:
      logits: float32 `[..., T, V]`.
      targets: int32 `[..., T]`.
      weights: float32 `[..., T]`, 0 for padding.

    Returns:
      float32 `[...]`; 0 for a target without tokens.
    """
    return -jnp.sum(token_losses(logits, targets)[0] * weights, axis=-1)


def _masked_log_softmax(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-softmax over the entries where `mask` holds; 0 elsewhere, never -inf or NaN."""
    x = jnp.where(mask, x, -1e30)
    return jnp.where(mask, jax.nn.log_softmax(x, axis=-1), 0.0)


def distillation(
    scores: jax.Array,
    lm_log_likelihood: jax.Array,
    mask: jax.Array,
    *,
    temperature: float,
    direction: str = "lm_to_rank",
) -> jax.Array:
    """KL divergence between the reader's and the reranker's distribution over passages.

    `p_lm = softmax(log p(answer | passage) / temperature)`, without gradient;
    `p_rank = softmax(score / temperature)`; both over the existing passages.

    Args:
      scores: float32 `[B, K]`; may be -inf where `mask` is False.
      lm_log_likelihood: float32 `[B, K]`.
      mask: bool `[B, K]`, passages that exist.
      temperature: tau of both distributions.
      direction: `lm_to_rank` is KL(p_lm || p_rank), as in Atlas; `rank_to_lm` the reverse.

    Returns:
      float32 `[B]`, in nats; 0 for fewer than two passages.

    Raises:
      ValueError: `direction` is unknown.
    """
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"kl_direction must be one of {KL_DIRECTIONS}, got {direction!r}.")
    log_lm = _masked_log_softmax(jax.lax.stop_gradient(lm_log_likelihood) / temperature, mask)
    log_rank = _masked_log_softmax(jnp.where(mask, scores, 0.0) / temperature, mask)
    first, second = (log_lm, log_rank) if direction == "lm_to_rank" else (log_rank, log_lm)
    terms = jnp.where(mask, jnp.exp(first) * (first - second), 0.0)
    return jnp.sum(terms, axis=-1) * (jnp.sum(mask, axis=-1) >= 2)


def supervised_rerank(
    scores: jax.Array, gold: jax.Array, mask: jax.Array, *, temperature: float
) -> jax.Array:
    """Negative log of the reranker's total probability of the gold passages.

    Args:
      scores: float32 `[B, K]`.
      gold: `[B, K]`, nonzero for passages that contain the answer.
      mask: bool `[B, K]`, passages that exist.
      temperature: tau of the softmax over scores.

    Returns:
      float32 `[B]`, in nats; 0 for a question without gold passages.
    """
    log_rank = _masked_log_softmax(jnp.where(mask, scores, 0.0) / temperature, mask)
    is_gold = (gold > 0) & mask
    has_gold = jnp.any(is_gold, axis=-1)
    # Without gold passages, sum over all of them: the gradient of log 0 would be NaN.
    chosen = jnp.where(is_gold | ~has_gold[:, None], log_rank, -1e30)
    return jnp.where(has_gold, -jax.nn.logsumexp(chosen, axis=-1), 0.0)
