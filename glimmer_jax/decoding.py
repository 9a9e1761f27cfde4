"""Greedy search, sampling, beam search and scoring of given answers, for any step function.

Each loop ends as soon as its result is final. A step takes the last token of every beam, `[B, W]`,
its position, and a cache whose leaves have `[B, W]` on the two axes after `cache_offset`. It returns
logits `[B, W, V]` and the new cache. Arrays that all beams share (the encoder's keys and values)
belong in the step's closure, where beam search does not reorder them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

# Below any score, and finite: the difference of two of them is not NaN.
WORST = -1e30


def greedy(
    step: Step, cache: Any, *, batch: int, length: int, eos_id: int
) -> tuple[jax.Array, jax.Array]:
    """Takes the most probable token until all rows have ended.

    Args:
      step: see the module's docstring; called with one beam.
      cache: its cache before the first token.
      batch: B.
      length: T, tokens to produce at most, the end token included.
      eos_id: token that ends a row.

    Returns:
      int32 `[B, T]`, 0 after the end token; float32 `[B]` summed log probability.
    """

    def best(log_probs, index):
        del index
        return jnp.argmax(log_probs, axis=-1)

    return _token_by_token(step, cache, best, batch=batch, length=length, eos_id=eos_id)


def sample(
    step: Step,
    cache: Any,
    *,
    batch: int,
    length: int,
    eos_id: int,
    rng: jax.Array,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Samples from softmax(logits / temperature), truncated by top-k and top-p, until all rows end.

    A row's sample depends on `rng` and its index, not on the other rows.

    Args:
      step: see the module's docstring; called with one beam.
      cache: its cache before the first token.
      batch: B.
      length: T, tokens to produce at most, the end token included.
      eos_id: token that ends a row.
      rng: a random key.
      temperature: above 0; 1 is the model's own distribution.
      top_k: see `truncate`, which is applied after the division by the temperature.
      top_p: likewise.

    Returns:
      int32 `[B, T]`, 0 after the end token; float32 `[B]` summed log probability of the answer under
      the untruncated model at temperature 1, comparable with the scores of the other searches.
    """

    def draw(log_probs, index):
        logits = truncate(log_probs / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(rng, index), logits)

    return _token_by_token(step, cache, draw, batch=batch, length=length, eos_id=eos_id)


def truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits `[..., V]` with `WORST` for tokens that must not be sampled.

    Keeps the `top_k` most probable tokens (0: all), then, after renormalisation, the smallest set of
    most probable tokens with a total probability of at least `top_p`. Ties are kept.
    """
    if 0 < top_k < logits.shape[-1]:
        worst_kept = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < worst_kept, WORST, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered)
        better = jnp.cumsum(probs, axis=-1) - probs  # total probability of the better tokens
        worst_kept = jnp.min(jnp.where(better < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < worst_kept, WORST, logits)
    return logits


def _token_by_token(
    step: Step,
    cache: Any,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    batch: int,
    length: int,
    eos_id: int,
) -> tuple[jax.Array, jax.Array]:
    """The loop of greedy search and sampling: `choose(log_probs [B, V], index)` picks tokens `[B]`."""

    def unfinished(state):
        index, _, _, ended, _, _ = state
        return (index < length) & ~jnp.all(ended)

    def advance(state):
        index, last, cache, ended, tokens, score = state
        logits, cache = step(last[:, None], index, cache)
        log_probs = jax.nn.log_softmax(logits[:, 0])
        new = choose(log_probs, index).astype(jnp.int32)
        gain = jnp.take_along_axis(log_probs, new[:, None], axis=-1)[:, 0]
        new = jnp.where(ended, 0, new)
        score = score + jnp.where(ended, 0.0, gain)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, None], index, axis=1)
        return index + 1, new, cache, ended | (new == eos_id), tokens, score

    state = (
        jnp.int32(0),
        jnp.zeros((batch,), jnp.int32),
        cache,
        jnp.zeros((batch,), bool),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch,), jnp.float32),
    )
    _, _, _, _, tokens, score = jax.lax.while_loop(unfinished, advance, state)
    return tokens, score


def score(step: Step, cache: Any, answers_BNT: jax.Array) -> jax.Array:
    """log p of given answers, which take the place of beams.

    Args:
      step: see the module's docstring; called with N beams.
      cache: its cache before the first token.
      answers_BNT: int32 `[B, N, T]`, end token included, then 0; all 0 for an absent answer.

    Returns:
      float32 `[B, N]` summed log probability; -inf for absent answers.
    """
    real_BNT = answers_BNT > 0
    longest = jnp.max(jnp.sum(real_BNT, axis=-1))

    def advance(state):
        index, last, cache, total = state
        logits, cache = step(last, index, cache)
        wanted = jax.lax.dynamic_index_in_dim(answers_BNT, index, axis=2, keepdims=False)
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
        return index + 1, wanted, cache, total + jnp.where(wanted > 0, gain, 0.0)

    first = jnp.zeros_like(answers_BNT[..., 0])
    state = (jnp.int32(0), first, cache, first.astype(jnp.float32))
    *_, total = jax.lax.while_loop(lambda state: state[0] < longest, advance, state)
    return jnp.where(jnp.any(real_BNT, axis=-1), total, -jnp.inf)


def length_penalty(length: Any, alpha: float) -> Any:
    """The divisor of a summed log probability (arXiv 1609.08144, equation 14)."""
    return jnp.power((5.0 + length) / 6.0, alpha)


def beam(
    step: Step,
    cache: Any,
    *,
    batch: int,
    beams: int,
    length: int,
    eos_id: int,
    alpha: float = 0.6,
    cache_offset: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Beam search with a length penalty.

    Keeps `beams` unfinished and `beams` finished hypotheses per row, and stops when no unfinished
    hypothesis can overtake the worst finished one. Without a length penalty the answers equal those
    of Hugging Face's `generate`; T5X's search also accepts end tokens outside the beam.

    Args:
      step: see the module's docstring.
      cache: its cache before the first token.
      batch: B.
      beams: W.
      length: T, tokens to produce at most, the end token included.
      eos_id: token that ends a hypothesis.
      alpha: exponent of the length penalty; 0 is none.
      cache_offset: axes in front of `[B, W]` in the cache's leaves (1 for scanned layers).

    Returns:
      int32 `[B, W, T]` and float32 `[B, W]` penalised scores, the best hypothesis last, as in T5X.
    """

    def gather(tree, index_BW, offset=0):
        def gather_leaf(leaf):
            shape = (1,) * offset + index_BW.shape + (1,) * (leaf.ndim - 2 - offset)
            return jnp.take_along_axis(leaf, index_BW.reshape(shape), axis=1 + offset)

        return jax.tree.map(gather_leaf, tree)

    def unfinished(state):
        index, _, live_scores, _, _, finished_scores = state
        # Log probabilities only decrease: an upper bound of every live hypothesis.
        best_live = live_scores[:, 0] / length_penalty(length, alpha)
        return (index < length) & jnp.any(best_live > jnp.min(finished_scores, axis=1))

    def advance(state):
        index, cache, live_scores, live_tokens, finished_tokens, finished_scores = state
        previous = jnp.maximum(index - 1, 0)
        last = jax.lax.dynamic_index_in_dim(live_tokens, previous, axis=2, keepdims=False)
        last = jnp.where(index == 0, 0, last)
        logits, cache = step(last, index, cache)
        log_probs = jax.nn.log_softmax(logits) + live_scores[:, :, None]
        vocab = log_probs.shape[-1]
        # 2 x `beams` candidates: even if `beams` of them end here, as many stay live.
        scores, flat = jax.lax.top_k(log_probs.reshape(batch, -1), 2 * beams)
        origin, new = flat // vocab, (flat % vocab).astype(jnp.int32)
        tokens = gather(live_tokens, origin)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, new[:, :, None], index, axis=2)
        ended = new == eos_id

        live_scores, chosen = jax.lax.top_k(jnp.where(ended, WORST, scores), beams)
        live_tokens = gather(tokens, chosen)
        cache = gather(cache, gather(origin, chosen), cache_offset)

        # At the last position every live hypothesis counts as finished. As in Hugging Face's search,
        # an end token counts only among the `beams` best continuations.
        done = (ended | (index == length - 1)) & (jnp.arange(2 * beams) < beams)[None]
        penalised = jnp.where(done, scores / length_penalty(index + 1, alpha), WORST)
        pool_scores = jnp.concatenate([finished_scores, penalised], axis=1)
        pool_tokens = jnp.concatenate([finished_tokens, tokens], axis=1)
        finished_scores, chosen = jax.lax.top_k(pool_scores, beams)
        finished_tokens = gather(pool_tokens, chosen)
        return index + 1, cache, live_scores, live_tokens, finished_tokens, finished_scores

    # Only the first beam starts alive, or all beams would be the same hypothesis.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, WORST).astype(jnp.float32)
    state = (
        jnp.int32(0),
        cache,
        jnp.tile(first[None], (batch, 1)),
        jnp.zeros((batch, beams, length), jnp.int32),
        jnp.zeros((batch, beams, length), jnp.int32),
        jnp.full((batch, beams), WORST, jnp.float32),
    )
    *_, tokens, scores = jax.lax.while_loop(unfinished, advance, state)
    return tokens[:, ::-1], scores[:, ::-1]
