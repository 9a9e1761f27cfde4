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

from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen.partitioning import AxisMetadata

from glimmer_jax import axes, codecs, losses
from glimmer_jax.models import objective
from glimmer_jax.models.answers import DecodeConfig, answer, read
from glimmer_jax.models.codebooks import TRAINED
from glimmer_jax.models.glimmer import Batch, Glimmer, GlimmerConfig
from glimmer_jax.models.objective import LossConfig, Metrics
from glimmer_jax.models.selection import fuse
from glimmer_jax.partitioning import AXIS_RULES, gather_fsdp, parts_in_scope

Params = Any


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

    def with_config(self, config: GlimmerConfig) -> "GlimmerModel":
        """The same losses and decoding with another configuration."""
        return GlimmerModel(config, self.loss, self.decode, eos_id=self.eos_id)

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

    def init_params(self, rng: jax.Array) -> Params:
        """Random parameters, float32; can be traced."""
        return self.get_initial_variables(rng, self._smallest_shapes())["params"]

    def _smallest_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch to initialise with: no parameter depends on its lengths."""
        return {
            "question_tokens": (1, 1),
            "passage_tokens": (1, self.config.num_kept or 1, 1),
            "decoder_input_tokens": (1, 1),
        }

    def abstract_variables(self) -> tuple[Params, Any]:
        """Shapes and dtypes of the parameters, and a tree of their axis names, without computation."""
        names = {}

        def init(rng):
            variables = self.get_initial_variables(rng, self._smallest_shapes())
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
        return objective.normalizers(batch)

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
        objective.check_terms(self.loss, self.config, batch)
        return objective.weighted_loss(
            self.loss, self.module, params, batch, dropout_rng, normalizers
        )

    def eval_fn(self, params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
        """The loss without dropout, from tokens or memory."""
        return objective.weighted_loss(self.loss, self.module, params, batch)

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
        if parts_in_scope(axes.EMBED) > 1:
            params = self._with_gathered_decoder(params)
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

    def _with_gathered_decoder(self, params: Params) -> Params:
        """Gathers once what the token loop would gather along `fsdp` for every token."""
        names = self.abstract_variables()[1]
        params = flax.core.unfreeze(params)  # T5X freezes them.
        flat = {
            path: leaf.astype(self.config.t5.kernel_dtype(path[-2]))
            if path[-1] == "kernel"
            else leaf
            for path, leaf in flax.traverse_util.flatten_dict(params["decoder"]).items()
        }
        params["decoder"] = flax.traverse_util.unflatten_dict(flat)
        for key in ("decoder", "token_embedder"):
            params[key] = gather_fsdp(params[key], names[key])
        return params

    def score_batch(self, params: Params, batch: Batch, return_intermediates: bool = False) -> Any:
        """log p(target) of each row, float32 `[B]`; optionally with passage scores and selection."""
        logits, live, kept = self.module.apply({"params": params}, batch)
        scores = losses.log_likelihood(
            logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
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
