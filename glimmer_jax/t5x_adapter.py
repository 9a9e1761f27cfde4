"""Our models for T5X's `train`, `eval` and `infer`, with T5X installed; see docs/t5x.md.

`T5XModel` counts as a `t5x.models.BaseTransformerModel`. `partitioner` gives T5X our mesh and rule table.
Importing this module imports neither T5X nor clu nor seqio; the functions that need them do.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from glimmer_jax import axes
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.glimmer import Batch
from glimmer_jax.models.model import DecodeConfig, GlimmerModel, Params
from glimmer_jax.modes import checks
from glimmer_jax.modes.settings import DatasetConfig
from glimmer_jax.partitioning import AXIS_RULES, MeshConfig, make_mesh, spec
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.find_vocabulary import check_vocabulary_fits, find_vocabulary


class T5XModel:
    """FiD, LUMEN or GLIMMER as a `t5x.models.BaseTransformerModel`; passages are tokens."""

    def __init__(
        self,
        model: GlimmerModel,
        dataset: DatasetConfig,
        passages_dir: str | None = None,
        optimizer_def: Any = None,
        vocabulary: Vocabulary | str | None = None,
        allow_unused_embeddings: bool = False,
        label_smoothing: float = 0.0,
        loss_normalizing_factor: Any = None,
    ):
        """Checks the settings and configures the retrieved tasks; nothing is compiled.

        Args:
          model: FiD, LUMEN or GLIMMER.
          dataset: its task, lengths and retrieved files; T5X has its own settings for the rest. The
            task's vocabulary must be `vocabulary`. A name of None checks no task.
          passages_dir: passages folder for tasks with `passage_ids`.
          optimizer_def: a `t5x.optimizers.OptimizerDef`; None for eval and infer.
          vocabulary: of tasks and passages, or the path of its SentencePiece model.
          allow_unused_embeddings: accept a vocabulary that does not fill the embedding.
          label_smoothing: T5X's macro; only 0 is supported.
          loss_normalizing_factor: T5X's macro; only None is supported.

        Raises:
          ValueError: lengths, vocabulary or passages that do not fit the model, or a setting of T5X
            that our losses do not have.
        """
        if (models := sys.modules.get("t5x.models")) is not None:
            # T5X then compares the vocabularies of task and model itself.
            models.BaseTransformerModel.register(type(self))
        if label_smoothing:
            raise ValueError(
                f"LABEL_SMOOTHING={label_smoothing} is not supported: our losses smooth no labels. "
                "Remove it. The weights of our losses are Z_LOSS, DISTILLATION_WEIGHT and "
                "SUPERVISED_WEIGHT."
            )
        if loss_normalizing_factor is not None:
            raise ValueError(
                f"LOSS_NORMALIZING_FACTOR={loss_normalizing_factor} is not supported: our loss is the "
                "mean per target token. Remove it, and scale LEARNING_RATE instead."
            )
        if optimizer_def is not None and model.config.train_codebooks:
            raise ValueError(
                "TRAIN_CODEBOOKS=True is not supported: codebooks follow the encoder as moving "
                "averages, which T5X's optimisers do not compute. Set TRAIN_CODEBOOKS = False, or "
                "train with glimmer --run_mode=train."
            )
        if vocabulary is None or isinstance(vocabulary, str):
            vocabulary = find_vocabulary(vocabulary)
        if not hasattr(vocabulary, "fingerprint"):
            raise ValueError(
                f"VOCABULARY must be the path of a SentencePiece model, got {vocabulary!r}. Set for "
                "example --gin.VOCABULARY=\"'t5/spiece.model'\"."
            )
        self._model = model
        self._features: Mapping[str, Any] = {}
        self._lengths = checks.lengths_for(model.config, dataset.known_lengths)
        check_vocabulary_fits(model, vocabulary, allow_unused=allow_unused_embeddings)
        if (name := dataset.mixture_or_task_name) is not None:
            # seqio and tensorflow take seconds to import.
            from glimmer_jax.data import pipeline

            dataset.register(vocabulary)
            pipeline.check_vocabulary(name, vocabulary)
            self._features = pipeline.find_mixture_or_task(name).output_features
        self._vocabulary = vocabulary
        self._passages = None
        if passages_dir is not None:
            self._passages = Passages.open(passages_dir, vocabulary.fingerprint)
            self._passages.warn_of_cuts(self._lengths.passage)
        self.optimizer_def = optimizer_def

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:  # noqa: N802 (T5X's name)
        """Constructor of the seqio feature converter; T5X passes `pack`, which must be False."""
        from glimmer_jax.data.features import TokensConverter

        return functools.partial(TokensConverter, self._lengths, self._passages)

    @property
    def input_vocabulary(self) -> Any:
        """seqio's, of the questions: the task's own, because T5X also compares the paths."""
        return self._task_vocabulary("inputs")

    @property
    def output_vocabulary(self) -> Any:
        """seqio's, of the answers."""
        return self._task_vocabulary("targets")

    def _task_vocabulary(self, feature: str) -> Any:
        if feature in self._features:
            return self._features[feature].vocabulary
        return self._vocabulary.seqio()

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`params` and `params_axes`; see `GlimmerModel`."""
        return self._model.get_initial_variables(rng, input_shapes, input_types)

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The training loss and `{name: clu.metrics.Metric}`, ours and T5X's; see `GlimmerModel`."""
        return _with_clu_metrics(*self._model.loss_fn(params, batch, dropout_rng), batch)

    def eval_fn(self, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """The loss without dropout."""
        return _with_clu_metrics(*self._model.eval_fn(params, batch), batch)

    def predict_batch(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> jax.Array:
        """Answers, int32 `[B, T]`, 0 after the end token."""
        return self._model.predict_batch(params, batch, rng)

    def predict_batch_with_aux(
        self,
        params: Params,
        batch: Batch,
        rng: jax.Array | None = None,
        decoder_params: Mapping[str, Any] | None = None,
        return_all_decodes: bool = False,
        num_decodes: int | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Answers and the arrays that metrics read: `GlimmerModel`'s, and `gold_passages` if known.

        Args:
          params: the model's parameters.
          batch: of `FEATURE_CONVERTER_CLS`.
          rng: random key, needed for sampling.
          decoder_params: T5X's names `alpha` (of the length penalty), `temperature`, `topk`, `topp` and
            `decode_rng`; they replace the model's `DecodeConfig`.
          return_all_decodes: return all beams, int32 `[B, W, T]` with `scores` `[B, W]`, the best last.
          num_decodes: W; None for `BEAM_SIZE`.

        Raises:
          ValueError: other decoder parameters, two random keys, or several samples of one question.
        """
        given = dict(decoder_params or {})
        decode_rng = given.pop("decode_rng", None)
        if rng is not None and decode_rng is not None:
            raise ValueError(
                "rng and decoder_params['decode_rng'] are both given. Give one of them."
            )
        rng = decode_rng if rng is None else rng
        model = self._model
        decode = _decode_config(model.decode, given, num_decodes, return_all_decodes)
        if decode != model.decode:
            model = GlimmerModel(model.config, model.loss, decode, eos_id=model.eos_id)
        tokens, aux = model.predict_batch_with_aux(params, batch, rng)
        if "gold_passages" in batch:
            aux = {**aux, "gold_passages": batch["gold_passages"]}
        return tokens, aux

    def score_batch(self, params: Params, batch: Batch, return_intermediates: bool = False) -> Any:
        """log p(target) of each row, float32 `[B]`."""
        return self._model.score_batch(params, batch, return_intermediates)


# Decoder parameters of T5X -> fields of DecodeConfig.
_DECODER_PARAMS = {
    "alpha": "length_penalty",
    "temperature": "temperature",
    "topk": "top_k",
    "topp": "top_p",
}


def _decode_config(
    decode: DecodeConfig, given: Mapping[str, Any], beams: int | None, return_all: bool
) -> DecodeConfig:
    if unknown := sorted(given.keys() - _DECODER_PARAMS.keys()):
        raise ValueError(
            f"decoder_params: {', '.join(unknown)} is not supported. Supported are "
            f"{', '.join(_DECODER_PARAMS)} and decode_rng."
        )
    changes = {_DECODER_PARAMS[name]: value for name, value in given.items()}
    # T5X turns nucleus sampling off with 0.
    changes["top_p"] = changes.get("top_p", decode.top_p) or 1.0
    decode = dataclasses.replace(decode, **changes, return_all=return_all)
    if beams is None:
        return decode
    if decode.temperature and beams > 1:
        raise ValueError(
            f"num_decodes={beams} with temperature={decode.temperature}: one answer is sampled per "
            "question. Set num_decodes=1, and sample again with another decode_rng."
        )
    return dataclasses.replace(decode, beams=beams)


def _with_clu_metrics(
    loss: jax.Array, sums: Mapping[str, Any], batch: Batch
) -> tuple[jax.Array, dict[str, Any]]:
    from clu import metrics

    averages = {
        name: metrics.Average(total=total, count=weight) for name, (total, weight) in sums.items()
    }
    averages["loss"] = metrics.Average(total=loss, count=jnp.ones((), jnp.float32))
    if "t5x.metrics" in sys.modules:  # T5X is running us
        averages |= _t5x_metrics(sums, batch)
    return loss, averages


def _t5x_metrics(sums: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The metrics of `t5x.models.compute_base_metrics`; losses are those of the answers' tokens."""
    from clu import metrics
    from t5x import metrics as t5x_metrics

    (cross_entropy, tokens), (z_loss, _) = sums["cross_entropy"], sums["z_loss"]
    rows, size = batch["decoder_target_tokens"].shape[0], batch["decoder_target_tokens"].size
    devices = jax.device_count()

    def per_token(total: Any, count: Any) -> Any:
        return metrics.Average(total=total, count=jnp.asarray(count, jnp.float32))

    def rate(count: float) -> Any:
        return t5x_metrics.TimeRate.from_model_output(numerator=jnp.asarray(count, jnp.float32))

    return {
        "accuracy": per_token(sums["token_accuracy"][0], tokens),
        "cross_ent_loss": t5x_metrics.AveragePerStep(total=cross_entropy),
        "cross_ent_loss_per_all_target_tokens": per_token(cross_entropy, size),
        "z_loss": t5x_metrics.AveragePerStep(total=z_loss),
        "z_loss_per_all_target_tokens": per_token(z_loss, size),
        "loss_per_nonpadding_target_token": per_token(cross_entropy + z_loss, tokens),
        "loss_per_all_target_tokens": per_token(cross_entropy + z_loss, size),
        "non_padding_fraction/loss_weights": per_token(tokens, size),
        "timing/seconds": t5x_metrics.Time(),
        "timing/seqs": t5x_metrics.Sum(jnp.asarray(rows, jnp.float32)),
        "timing/seqs_per_second": rate(rows),
        "timing/seqs_per_second_per_core": rate(rows / devices),
        "timing/steps_per_second": t5x_metrics.StepsPerTime.from_model_output(),
        "timing/target_tokens_per_second": rate(size),
        "timing/target_tokens_per_second_per_core": rate(size / devices),
    }


def absolute_path(path: Any) -> Any:
    """A path or a list of paths for Orbax, which rejects relative ones. URLs and None are kept."""
    if isinstance(path, list | tuple):
        return [absolute_path(one) for one in path]
    return path if path is None or "://" in str(path) else os.path.abspath(path)


def factor_rules() -> Any:
    """`logical_factor_rules` for T5X's Adafactor: its own plus the axis names of our codebooks."""
    from t5x import adafactor

    # As in our own Adafactor, the second moments of codebooks are not factored.
    ours = dict.fromkeys((axes.CODEBOOK, axes.CODE, axes.CODE_CHANNEL), adafactor.FactorDim.NONE)
    return {**adafactor.standard_logical_factor_rules(), **ours}


def partitioner(mesh: MeshConfig = MeshConfig(), configured: Any = None) -> Any:
    """A `t5x.partitioning.PjitPartitioner` over our mesh, with our rule table.

    T5X's own partitioner enters `with mesh:`. JAX has deprecated that context, can forbid it
    (`jax_disallow_mesh_context_manager`), and ignores our models' activation constraints under it. This
    partitioner uses `jax.set_mesh` and also shards parameters over `fsdp`.

    Args:
      mesh: devices.
      configured: T5X's own partitioner with its settings, which are rejected unless they are the defaults
        of T5X's run files; None checks nothing.

    Raises:
      ValueError: `configured` divides the devices.
    """
    partitions = getattr(configured, "_num_partitions", None)
    submesh = getattr(configured, "_model_parallel_submesh", None)
    if partitions not in (None, 1) or submesh is not None:
        raise ValueError(
            f"PjitPartitioner.num_partitions={partitions} and model_parallel_submesh={submesh} are not "
            "used: the mesh has its own settings. Remove them and set MESH_MODEL, the devices that share "
            "heads, feed-forward layers and vocabulary."
        )
    from t5x import partitioning as t5x_partitioning

    devices = make_mesh(mesh)

    class Partitioner(t5x_partitioning.PjitPartitioner):
        """See `partitioner`."""

        mesh = devices

        def partition(
            self,
            fn: Callable[..., Any],
            in_axis_resources: Any,
            out_axis_resources: Any,
            static_argnums: Any = (),
            donate_argnums: Any = (),
        ) -> "_InMesh":
            return _InMesh(
                jax.jit(
                    fn,
                    in_shardings=_shardings(in_axis_resources),
                    out_shardings=_shardings(out_axis_resources),
                    static_argnums=static_argnums,
                    donate_argnums=donate_argnums,
                ),
                devices,
            )

    def _shardings(resources: Any) -> Any:
        # None means replicated to T5X, but unspecified to jit.
        is_leaf = lambda leaf: leaf is None or isinstance(leaf, PartitionSpec)  # noqa: E731
        return jax.tree.map(
            lambda leaf: NamedSharding(devices, PartitionSpec() if leaf is None else leaf),
            resources,
            is_leaf=is_leaf,
        )

    return Partitioner(
        num_partitions=devices.shape["model"],
        logical_axis_rules=tuple((name, spec((name,))[0]) for name in AXIS_RULES),
    )


class _InMesh:
    """A jitted function whose calls and lowerings, as T5X makes them, have the mesh in scope."""

    def __init__(self, jitted: Any, mesh: jax.sharding.Mesh):
        self._jitted = jitted
        self._mesh = mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(*args)

    def lower(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)
