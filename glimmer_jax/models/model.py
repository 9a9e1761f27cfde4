"""The T5X-style model class: losses, evaluation and prediction over batches of one contract.

Method names, argument names and batch keys are T5X's (`t5x.models.BaseTransformerModel`); T5X is not
imported. All methods that take `params` are pure, and callers may jit them.

A batch holds numpy or jax arrays:

    question_tokens        int32 [B, Q]     right-aligned, 0 is padding
    passage_tokens         int32 [B, K, P]  left-aligned; a passage of zeros is absent
      or passage_memory    {name: [B, K, P, ...]}, a codec's arrays, with
         passage_lengths   int32 [B, K]     tokens, 0 for absent passages
    decoder_input_tokens   int32 [B, T]     targets shifted right, 0 first
    decoder_target_tokens  int32 [B, T]
    decoder_loss_weights   float32 [B, T]   0 for padding
    gold_passages          int32 [B, K]     optional, nonzero for gold passages (`kilt.gold`)
    candidate_tokens       int32 [B, N, T]  optional, answers to choose from in prediction: end token
                                            included, then 0; all 0 for absent candidates
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import AxisMetadata

from glimmer_jax import codecs, losses
from glimmer_jax.models.answers import DecodeConfig, answer, read
from glimmer_jax.models.codebooks import TRAINED
from glimmer_jax.models.glimmer import Batch, Glimmer, GlimmerConfig
from glimmer_jax.models.selection import fuse
from glimmer_jax.models.teacher import answer_log_likelihoods
from glimmer_jax.partitioning import AXIS_RULES

Params = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training loss: GLIMMER (arXiv 2306.10231), section 3, and variants from related work."""

    z_loss: float = 1e-4  # weight of the squared log-normaliser
    distillation_weight: float = 1.0  # of perplexity distillation; 0 skips the teacher
    temperature: float = 1.0  # tau of both distributions over passages
    kl_direction: str = "lm_to_rank"  # or rank_to_lm
    mean_log_likelihood: bool = False  # log p per token instead of per answer, in the teacher
    clean_teacher: bool = False  # rerun the teacher's Live-A without dropout
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


class GlimmerModel:
    """FiD, LUMEN or GLIMMER, for training, evaluation and inference."""

    def __init__(
        self,
        config: GlimmerConfig,
        loss: LossConfig = LossConfig(),
        decode: DecodeConfig = DecodeConfig(),
        *,
        eos_id: int = 1,
    ):
        self.config = config
        self.loss = loss
        self.decode = decode
        self.eos_id = eos_id
        self.module = Glimmer(config)

    @property
    def FEATURE_CONVERTER_CLS(self) -> type:  # noqa: N802 (T5X's name)
        """The seqio feature converter; imports seqio."""
        from glimmer_jax.data.features import GlimmerFeatureConverter

        return GlimmerFeatureConverter

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Random parameters and the names of their dimensions.

        Args:
          rng: a random key.
          input_shapes: shape of each batch array; only `question_tokens`, `passage_tokens` and
            `decoder_input_tokens` are used, and no parameter depends on them.
          input_types: their dtypes; int32 by default.

        Returns:
          `params`, float32, and `params_axes` with a T5X `AxisMetadata` per parameter.
        """
        types = input_types or {}
        keys = ("question_tokens", "passage_tokens", "decoder_input_tokens")
        batch = {key: jnp.ones(input_shapes[key], types.get(key, jnp.int32)) for key in keys}
        # Flax constrains boxed parameters during initialisation by its own rules. Without ours, every
        # device would temporarily hold all parameters.
        rules = tuple((name, mesh_axes or None) for name, mesh_axes in AXIS_RULES.items())
        with nn.logical_axis_rules(rules):
            boxed = self.module.init(rng, batch)["params"]

        def metadata(path, box):
            if not isinstance(box, nn.Partitioned):
                raise ValueError(f"Parameter {jax.tree_util.keystr(path)} names no axes.")
            return AxisMetadata(box.names)

        axes_tree = jax.tree_util.tree_map_with_path(
            metadata, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
        )
        return {"params": nn.unbox(boxed), "params_axes": axes_tree}

    def abstract_variables(self) -> tuple[Params, Any]:
        """Shapes and dtypes of the parameters, and a tree of their axis names, without computation."""
        config = self.config
        passages = config.num_kept or 1
        shapes = {
            "question_tokens": (1, 1),
            "passage_tokens": (1, passages, 1),
            "decoder_input_tokens": (1, 1),
        }
        names = {}

        def init(rng):
            variables = self.get_initial_variables(rng, shapes)
            names["tree"] = variables["params_axes"]
            return variables["params"]

        params = jax.eval_shape(init, jax.random.key(0))
        is_leaf = lambda leaf: isinstance(leaf, AxisMetadata)  # noqa: E731
        return params, jax.tree.map(lambda leaf: leaf.names, names["tree"], is_leaf=is_leaf)

    def frozen(self, params: Params) -> Any:
        """A tree like `params`, True for parameters that are not trained."""
        names = ("memory_encoder", "memory_embedder") if self.config.freeze_memory else ()
        tree = {
            key: jax.tree.map(lambda _, key=key: key in names, subtree)
            for key, subtree in params.items()
        }
        if "memory_codebooks" in tree:
            trained = TRAINED if self.config.train_codebooks else ()
            tree["memory_codebooks"] = {
                name: name not in trained for name in tree["memory_codebooks"]
            }
        return tree

    def loss_normalizers(self, batch: Batch) -> dict[str, jax.Array]:
        """Denominators of the loss, for the complete batch.

        Gradient accumulation passes them to `loss_fn` of each microbatch, so that the sum of the
        microbatches' gradients is the gradient of the batch.
        """
        exists = _passage_exists(batch)
        counts = {
            "tokens": jnp.sum(jnp.asarray(batch["decoder_loss_weights"], jnp.float32)),
            "questions": jnp.sum(_is_distilled(batch, exists)).astype(jnp.float32),
        }
        if "gold_passages" in batch:
            gold = (jnp.asarray(batch["gold_passages"]) > 0) & exists
            counts["gold_questions"] = jnp.sum(jnp.any(gold, axis=-1)).astype(jnp.float32)
        return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}

    def loss_fn(
        self,
        params: Params,
        batch: Batch,
        dropout_rng: jax.Array | None,
        normalizers: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The training loss, float32, and sums of metrics.

        Args:
          params: the model's parameters.
          batch: see the module's docstring.
          dropout_rng: random key for dropout; None disables dropout.
          normalizers: `loss_normalizers` of the batch that this microbatch belongs to.

        Returns:
          The loss and `{name: (total, weight)}`, which add up over batches.

        Raises:
          ValueError: the batch holds memory although the memory encoder is trained: the encoder would
            get no gradient, and the memory would be stale after the first step. Or a term of the
            loss lacks its data: `gold_passages`, or more than one passage per question.
        """
        if "passage_memory" in batch and not self.config.freeze_memory:
            raise ValueError(
                "Training from stored memory needs a frozen memory encoder: set freeze_memory=True, or "
                "train from passage_tokens."
            )
        self._check_terms(batch)
        return self._loss(params, batch, dropout_rng, normalizers)

    def _check_terms(self, batch: Batch) -> None:
        if not self.config.rerank_layers:
            return
        num_passages = _passage_exists(batch).shape[1]
        if self.loss.distillation_weight and num_passages == 1:
            raise ValueError(
                "DISTILLATION_WEIGHT compares the passages of a question, and these batches have one per "
                "question (K=1). Set DISTILLATION_WEIGHT=0, or read more passages "
                "(TASK_FEATURE_LENGTHS)."
            )
        if self.loss.supervised_weight and "gold_passages" not in batch:
            raise ValueError(
                f"SUPERVISED_WEIGHT={self.loss.supervised_weight} needs gold_passages, and these batches "
                f"have {sorted(batch)}. Set it to 0, or use tasks with gold_passages."
            )

    def eval_fn(self, params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        """The loss without dropout, from tokens or memory."""
        return self._loss(params, batch, None, None)

    def _loss(self, params, batch, dropout_rng, normalizers):
        config, loss_config = self.config, self.loss
        if normalizers is None:
            normalizers = self.loss_normalizers(batch)
        rngs = None if dropout_rng is None else {"dropout": dropout_rng}
        logits, live, kept = self.module.apply({"params": params}, batch, rngs=rngs)

        targets = batch["decoder_target_tokens"]
        weights = jnp.asarray(batch["decoder_loss_weights"], jnp.float32)
        by_token, z = losses.token_losses(logits, targets)
        cross_entropy = jnp.sum(by_token * weights)
        z_loss = loss_config.z_loss * jnp.sum(z * weights)
        loss = loss_config.cross_entropy_weight * (cross_entropy + z_loss) / normalizers["tokens"]

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
        if config.rerank_layers and loss_config.distillation_weight and live.scores.shape[1] > 1:
            distillation, count = self._distillation(params, batch, live, exists)
            loss += loss_config.distillation_weight * distillation / normalizers["questions"]
            metrics["distillation"] = (distillation, count)

        if "gold_passages" in batch:
            gold = (batch["gold_passages"] > 0) & exists
            num_gold = jnp.sum(jnp.any(gold, axis=-1)).astype(jnp.float32)
            best = jnp.argmax(live.scores, axis=-1)[:, None]
            for name, passages in (("recall_at_1", best), ("recall_kept", kept)):
                hits = jnp.any(jnp.take_along_axis(gold, passages, axis=1), axis=1)
                metrics[name] = (jnp.sum(hits).astype(jnp.float32), num_gold)
            if config.rerank_layers and loss_config.supervised_weight:
                supervised = jnp.sum(
                    losses.supervised_rerank(
                        live.scores, gold, exists, temperature=loss_config.temperature
                    )
                )
                loss += loss_config.supervised_weight * supervised / normalizers["gold_questions"]
                metrics["supervised_rerank"] = (supervised, num_gold)
        return loss, metrics

    def _distillation(self, params, batch, live, exists):
        """Perplexity distillation summed over the questions it applies to, and their number."""
        teacher = live
        if self.loss.clean_teacher:
            teacher = self.module.apply({"params": params}, batch, method="rerank")
        usefulness = answer_log_likelihoods(
            self.module,
            params,
            batch,
            teacher,
            chunk=self.loss.teacher_chunk,
            mean=self.loss.mean_log_likelihood,
        )
        by_question = losses.distillation(
            live.scores,
            usefulness,
            exists,
            temperature=self.loss.temperature,
            direction=self.loss.kl_direction,
        )
        distilled = _is_distilled(batch, exists)
        return jnp.sum(by_question * distilled), jnp.sum(distilled).astype(jnp.float32)

    def predict_batch(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> jax.Array:
        """Answers, int32 `[B, T]`, 0 after the end token."""
        return self.predict_batch_with_aux(params, batch, rng)[0]

    def predict_batch_with_aux(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Answers with their scores, passage scores and kept passages.

        Args:
          params: the model's parameters.
          batch: see the module's docstring. With `candidate_tokens` the answer is the most probable
            candidate, and `decode` is ignored.
          rng: random key, needed if `decode` samples.

        Returns:
          int32 `[B, T]`, and `scores` float32 `[B]` (log probability, penalised for beams),
          `passage_scores` float32 `[B, K]`, `kept_passages` int32 `[B, m]` (indices into the K); with
          candidates also `candidate_scores` float32 `[B, N]`, log probabilities.

        Raises:
          ValueError: `decode` samples, and `rng` is None.
        """
        encoded, mask, chosen = self.read_batch(params, batch)
        tokens, aux = self.answer_batch(
            params,
            encoded,
            mask,
            length=batch["decoder_input_tokens"].shape[1],
            rng=rng,
            candidates=batch.get("candidate_tokens"),
        )
        return tokens, {**aux, **chosen}

    def read_batch(
        self, params: Params, batch: Batch
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """The first half of `predict_batch_with_aux`: reranks, and reads the kept passages.

        Returns:
          States `[B, S, D]` of the kept passages, their mask bool `[B, S]`, and `passage_scores`
          float32 `[B, K]` with `kept_passages` int32 `[B, m]`.
        """
        variables = {"params": params}
        states, mask, kept, scores = self.module.apply(variables, batch, method="choose")
        states = read(self.module, variables, states, mask, self.config.read_chunk)
        encoded, mask = fuse(states, mask)
        return encoded, mask, {"passage_scores": scores, "kept_passages": kept}

    def answer_batch(
        self,
        params: Params,
        encoded: jax.Array,
        mask: jax.Array,
        *,
        length: int,
        rng: jax.Array | None = None,
        candidates: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The second half of `predict_batch_with_aux`: answers from what `read_batch` returned."""
        return answer(
            self.module,
            {"params": params},
            encoded,
            mask,
            self.decode,
            length=length,
            eos_id=self.eos_id,
            rng=rng,
            candidates=candidates,
        )

    def score_batch(self, params: Params, batch: Batch, return_intermediates: bool = False) -> Any:
        """log p(target) of each row, float32 `[B]`; optionally with passage scores and selection."""
        logits, live, kept = self.module.apply({"params": params}, batch)
        scores = losses.log_likelihood(
            logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"], mean=False
        )
        if return_intermediates:
            return scores, {"passage_scores": live.scores, "kept_passages": kept}
        return scores

    def memory_states(self, params: Params, passage_tokens: jax.Array) -> jax.Array:
        """Unrounded states of passages `[n, P]` after layer M, `[n, P, D]`.

        Raises:
          ValueError: the model has no memory encoder.
        """
        return self._of_memory("memory_states", params, passage_tokens)

    def encode_memory(self, params: Params, passage_tokens: jax.Array) -> dict[str, jax.Array]:
        """Memory of passages `[n, P]`, as the codec's arrays `[n, P, *trailing]`.

        Raises:
          ValueError: the model has no memory encoder.
        """
        return self._of_memory("encode_memory", params, passage_tokens)

    def _of_memory(self, method: str, params: Params, passage_tokens: jax.Array) -> Any:
        if not self.config.memory_layers:
            raise ValueError(
                "memory_layers is 0 (FiD): there is no memory to precompute. Use LUMEN or GLIMMER."
            )
        return self.module.apply({"params": params}, passage_tokens, method=method)

    def memory_specs(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Trailing shape and dtype of each array of `encode_memory`."""
        return codecs.get(self.config.memory_codec).array_specs(self.config.t5.emb_dim)


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
