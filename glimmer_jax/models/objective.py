"""The training objective: cross-entropy with z-loss, perplexity distillation, supervised reranking.

GLIMMER (arXiv 2306.10231), section 3. `losses` has the terms per token and per question; here they
are computed for a batch (the contract of `models.model`), weighted and summed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax import losses
from glimmer_jax.models.glimmer import Batch, Glimmer, GlimmerConfig
from glimmer_jax.models.selection import Live
from glimmer_jax.models.teacher import answer_log_likelihoods

# {name: (total, weight)}; both add up over batches.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training loss: GLIMMER (arXiv 2306.10231), section 3, and variants from related work."""

    z_loss: float = 1e-4  # weight of the squared log-normaliser
    distillation_weight: float = 1.0  # of perplexity distillation; 0 skips the teacher
    temperature: float = 1.0  # tau of both distributions over passages
    kl_direction: str = "lm_to_rank"  # or rank_to_lm
    teacher_chunk: int = 8  # passages per device whose [B, T, V] logits exist at the same time
    supervised_weight: float = 0.0  # of -log p_rank(gold), if gold passages are known
    cross_entropy_weight: float = 1.0  # includes z-loss; 0 trains only the scores

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.kl_direction not in losses.KL_DIRECTIONS:
            raise ValueError(
                f"kl_direction must be one of {losses.KL_DIRECTIONS}, got {self.kl_direction!r}."
            )
        if self.teacher_chunk < 1:
            raise ValueError(f"teacher_chunk must be at least 1, got {self.teacher_chunk}.")
        weights = (self.z_loss, self.distillation_weight, self.supervised_weight)
        if min(*weights, self.cross_entropy_weight) < 0:
            raise ValueError(f"Loss weights must not be negative, got {self}.")


def normalizers(batch: Batch) -> dict[str, jax.Array]:
    """Denominators of the loss: float32 counts of tokens and questions, at least 1."""
    exists = _passage_exists(batch)
    counts = {
        "tokens": jnp.sum(jnp.asarray(batch["decoder_loss_weights"], jnp.float32)),
        "questions": jnp.sum(_is_distilled(batch, exists)).astype(jnp.float32),
    }
    if "gold_passages" in batch:
        gold = (jnp.asarray(batch["gold_passages"]) > 0) & exists
        counts["gold_questions"] = jnp.sum(jnp.any(gold, axis=-1)).astype(jnp.float32)
    return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}


def check_terms(config: LossConfig, model: GlimmerConfig, batch: Batch) -> None:
    """Raises ValueError where a term of the loss lacks its data."""
    if not model.rerank_layers:
        return
    num_passages = _passage_exists(batch).shape[1]
    if config.distillation_weight and num_passages == 1:
        raise ValueError(
            "DISTILLATION_WEIGHT compares the passages of a question, and these batches have one per "
            "question (K=1). Set DISTILLATION_WEIGHT=0, or read more passages "
            "(TASK_FEATURE_LENGTHS)."
        )
    if config.supervised_weight and "gold_passages" not in batch:
        raise ValueError(
            f"SUPERVISED_WEIGHT={config.supervised_weight} needs gold_passages, and these batches "
            f"have {sorted(batch)}. Set it to 0, or use tasks with gold_passages."
        )


def weighted_loss(
    config: LossConfig,
    module: Glimmer,
    params: Any,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
    denominators: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of all terms, float32, and its metrics.

    Args:
      config: the weights.
      module: the model.
      params: its parameters.
      batch: see `models.model`.
      dropout_rng: random key for dropout; None disables dropout.
      denominators: `normalizers` of the batch that this microbatch belongs to; None: its own.
    """
    if denominators is None:
        denominators = normalizers(batch)
    reranks = module.config.rerank_layers > 0
    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    logits, live, kept = module.apply({"params": params}, batch, rngs=rngs)

    targets = batch["decoder_target_tokens"]
    weights = jnp.asarray(batch["decoder_loss_weights"], jnp.float32)
    by_token, z = losses.token_losses(logits, targets)
    cross_entropy = jnp.sum(by_token * weights)
    z_loss = config.z_loss * jnp.sum(z * weights)
    loss = config.cross_entropy_weight * (cross_entropy + z_loss) / denominators["tokens"]

    num_tokens = jnp.sum(weights)
    correct = (jnp.argmax(logits, axis=-1) == targets) * weights
    metrics = {
        "cross_entropy": (cross_entropy, num_tokens),
        # For copied answers the first token is the hard one: it depends on the right passage.
        "first_token": (jnp.sum((by_token * weights)[:, 0]), jnp.sum(weights[:, 0])),
        "z_loss": (z_loss, num_tokens),
        "token_accuracy": (jnp.sum(correct), num_tokens),
    }

    exists = _passage_exists(batch)
    if reranks and config.distillation_weight and live.scores.shape[1] > 1:
        distillation, count = _distillation(config, module, params, batch, live, exists)
        loss += config.distillation_weight * distillation / denominators["questions"]
        metrics["distillation"] = (distillation, count)

    if "gold_passages" in batch:
        gold = (batch["gold_passages"] > 0) & exists
        num_gold = jnp.sum(jnp.any(gold, axis=-1)).astype(jnp.float32)
        # Over all questions, as in evaluation (`metrics.reranking`).
        asked = jnp.any(jnp.asarray(batch["question_tokens"]) > 0, axis=-1)
        num_questions = jnp.sum(asked).astype(jnp.float32)
        best = jnp.argmax(live.scores, axis=-1)[:, None]
        for name, passages in (("recall_at_1", best), ("recall_kept", kept)):
            hits = jnp.any(jnp.take_along_axis(gold, passages, axis=1), axis=1)
            metrics[name] = (jnp.sum(hits).astype(jnp.float32), num_questions)
        if reranks and config.supervised_weight:
            supervised = jnp.sum(
                losses.supervised_rerank(live.scores, gold, exists, temperature=config.temperature)
            )
            loss += config.supervised_weight * supervised / denominators["gold_questions"]
            metrics["supervised_rerank"] = (supervised, num_gold)
    return loss, metrics


def _distillation(
    config: LossConfig,
    module: Glimmer,
    params: Any,
    batch: Batch,
    live: Live,
    exists: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Perplexity distillation summed over the questions it applies to, and their number."""
    usefulness = answer_log_likelihoods(module, params, batch, live, chunk=config.teacher_chunk)
    by_question = losses.distillation(
        live.scores,
        usefulness,
        exists,
        temperature=config.temperature,
        direction=config.kl_direction,
    )
    distilled = _is_distilled(batch, exists)
    return jnp.sum(by_question * distilled), jnp.sum(distilled).astype(jnp.float32)


def _passage_exists(batch: Batch) -> jax.Array:
    """bool `[B, K]`."""
    if "passage_memory" in batch:
        return jnp.asarray(batch["passage_lengths"]) > 0
    return jnp.any(jnp.asarray(batch["passage_tokens"]) > 0, axis=-1)


def _is_distilled(batch: Batch, exists: jax.Array) -> jax.Array:
    """bool `[B]`: questions with passages to compare and an answer to compare them by.

    Without answer tokens all passages are equally useful, and scores would be trained to be equal.

    Args:
      batch: see the module's docstring.
      exists: bool `[B, K]`, passages that there are.
    """
    answered = jnp.sum(jnp.asarray(batch["decoder_loss_weights"]) > 0, axis=-1) > 0
    return answered & (jnp.sum(exists, axis=-1) >= 2)
