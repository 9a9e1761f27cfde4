"""From kept passages to answers: greedy search, beam search, sampling, or scoring of candidates.

Cross-attention keys and values are computed once per question, before the first token. All beams and
candidates share them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax import decoding
from glimmer_jax.models.glimmer import Glimmer

# Candidates whose caches and attention weights exist at the same time.
CANDIDATE_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The decoding method. The batch's `decoder_input_tokens` set the maximum length."""

    beams: int = 1  # 1 is greedy
    length_penalty: float = 0.6  # exponent, for beams only; 0 is none
    temperature: float = 0.0  # above 0 samples; 1 is the model's distribution
    top_k: int = 0  # sample from the k most probable tokens; 0 is all
    top_p: float = 1.0  # sample from the smallest set of tokens with this total probability
    return_all: bool = False  # `[B, W, T]`, the best of the W beams last, as T5X does; not `[B, T]`

    def __post_init__(self):
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, got {self.beams}.")
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(
                f"length_penalty must be finite and not negative, got {self.length_penalty}."
            )
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature and top_k must be finite and not negative, top_p in (0, 1]; got "
                f"temperature={self.temperature}, top_k={self.top_k} and top_p={self.top_p}."
            )
        if self.temperature and self.beams > 1:
            raise ValueError(
                f"temperature={self.temperature} samples and beams={self.beams} searches. Set "
                "temperature=0, or beams=1."
            )
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p} only apply to sampling, and temperature "
                "is 0. Set a temperature, or top_k=0 and top_p=1."
            )


def read(
    module: Glimmer, variables: Any, states: jax.Array, mask: jax.Array, chunk: int | None
) -> jax.Array:
    """`Glimmer.read` of `[B, M, N, D]`, at most `chunk` passages at a time; None is all at once."""

    def read_chunk(passages):
        return module.apply(variables, *passages, method="read")

    count = states.shape[1]
    largest = min(chunk or count, count)
    size = next(size for size in range(largest, 0, -1) if count % size == 0)
    if size == count:
        return read_chunk((states, mask))

    def by_chunk(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    chunks = jax.lax.map(read_chunk, (by_chunk(states), by_chunk(mask)))
    return jnp.moveaxis(chunks, 0, 1).reshape(states.shape)


def answer(
    module: Glimmer,
    variables: Any,
    encoded: jax.Array,
    mask: jax.Array,
    decode: DecodeConfig,
    *,
    length: int,
    eos_id: int,
    rng: jax.Array | None = None,
    candidates: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One answer per question, or all beams.

    Args:
      module: the model.
      variables: its `{"params": ...}`.
      encoded: states of the kept passages, `[B, S, D]`.
      mask: bool `[B, S]`.
      decode: the decoding method; ignored if there are candidates.
      length: T, maximum number of tokens of an answer, the end token included.
      eos_id: token that ends an answer.
      rng: random key, needed for sampling.
      candidates: int32 `[B, N, T]`, answers to choose from; see `decoding.score`.

    Returns:
      int32 `[B, T]`, 0 after the end token, and `scores` float32 `[B]`: log probabilities, with
      length penalty for beams; `[B, W, T]` and `[B, W]` with `decode.return_all`. With candidates
      also `candidate_scores` float32 `[B, N]`; ties go to the first.

    Raises:
      ValueError: `decode` samples, and `rng` is None.
    """
    batch = encoded.shape[0]
    cross = module.apply(variables, encoded, method="start_decoding")

    def step(tokens, index, cache):
        return module.apply(variables, tokens, index, cache, cross, mask, method="decode_step")

    def empty_cache(beams, length=length):
        return module.apply(variables, batch, beams, length, method="empty_cache")

    if candidates is not None:
        chunks = _in_chunks(candidates)
        scores = jax.lax.map(lambda x: decoding.score(step, empty_cache(*x.shape[1:]), x), chunks)
        scores = jnp.moveaxis(scores, 0, 1).reshape(batch, -1)[:, : candidates.shape[1]]
        best = jnp.argmax(scores, axis=1)[:, None]
        tokens = jnp.take_along_axis(candidates, best[..., None], axis=1)[:, 0]
        chosen = jnp.take_along_axis(scores, best, axis=1)[:, 0]
        return tokens, {"scores": chosen, "candidate_scores": scores}

    if decode.temperature:
        if rng is None:
            raise ValueError(
                f"temperature={decode.temperature} samples answers and needs a random key (rng)."
            )
        tokens, scores = decoding.sample(
            step,
            empty_cache(1),
            batch=batch,
            length=length,
            eos_id=eos_id,
            rng=rng,
            temperature=decode.temperature,
            top_k=decode.top_k,
            top_p=decode.top_p,
        )
    elif decode.beams > 1:
        tokens, scores = decoding.beam(
            step,
            empty_cache(decode.beams),
            batch=batch,
            beams=decode.beams,
            length=length,
            eos_id=eos_id,
            alpha=decode.length_penalty,
            cache_offset=1 if module.config.t5.scan_layers else 0,
        )
        if decode.return_all:
            return tokens, {"scores": scores}
        tokens, scores = tokens[:, -1], scores[:, -1]
    else:
        tokens, scores = decoding.greedy(
            step, empty_cache(1), batch=batch, length=length, eos_id=eos_id
        )
    if decode.return_all:
        tokens, scores = tokens[:, None], scores[:, None]
    return tokens, {"scores": scores}


def _in_chunks(candidates: jax.Array) -> jax.Array:
    """`[B, N, T]` -> `[chunks, B, N / chunks, T]`, padded with absent candidates."""
    batch, count, length = candidates.shape
    chunks = -(-count // CANDIDATE_CHUNK)
    size = -(-count // chunks)
    padded = jnp.pad(candidates, ((0, 0), (0, chunks * size - count), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, chunks, size, length), 1, 0)
