"""Our models for T5X's `train`, `eval` and `infer`, with T5X installed; see docs/t5x.md.

`T5XModel` has the methods of `t5x.models.BaseModel`. `partitioner` gives T5X our mesh and rule table.
Importing this module imports neither T5X nor clu nor seqio; the functions that need them do.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from glimmer_jax import axes
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.glimmer import Batch
from glimmer_jax.models.model import GlimmerModel, Params
from glimmer_jax.modes import checks
from glimmer_jax.partitioning import AXIS_RULES, MeshConfig, make_mesh, spec
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.find_vocabulary import check_vocabulary_fits, find_vocabulary


class T5XModel:
    """FiD, LUMEN or GLIMMER with the methods of `t5x.models.BaseModel`; passages are tokens."""

    def __init__(
        self,
        model: GlimmerModel,
        task_feature_lengths: Mapping[str, Any],
        passages_dir: str | None = None,
        optimizer_def: Any = None,
        vocabulary: Vocabulary | str | None = None,
        allow_unused_embeddings: bool = False,
        mixture_or_task_name: str | None = None,
        mixture_or_task_module: str | None = None,
        data_dir: str | None = None,
        min_bleu_score: float | None = None,
        label_smoothing: float = 0.0,
        loss_normalizing_factor: Any = None,
    ):
        """Checks the settings and configures the retrieved tasks; nothing is compiled.

        Args:
          model: FiD, LUMEN or GLIMMER.
          task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
          passages_dir: passages folder for tasks with `passage_ids`.
          optimizer_def: a `t5x.optimizers.OptimizerDef`; None for eval and infer.
          vocabulary: of tasks and passages, or the path of its SentencePiece model.
          allow_unused_embeddings: accept a vocabulary that does not fill the embedding.
          mixture_or_task_name: whose vocabulary is compared with `vocabulary`; T5X compares it for
            models of its own base class only. None compares nothing.
          mixture_or_task_module: imported first; registers the tasks.
          data_dir: folder of the retrieved files, for tasks that read them.
          min_bleu_score: training answers with a lower `bleu_score` are left out.
          label_smoothing: T5X's macro; only 0 is supported.
          loss_normalizing_factor: T5X's macro; only None is supported.

        Raises:
          ValueError: lengths, vocabulary or passages that do not fit the model, or a setting of T5X
            that our losses do not have.
        """
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
        if vocabulary is None or isinstance(vocabulary, str):
            vocabulary = find_vocabulary(vocabulary)
        if not hasattr(vocabulary, "fingerprint"):
            raise ValueError(
                f"VOCABULARY must be the path of a SentencePiece model, got {vocabulary!r}. Set for "
                "example --gin.VOCABULARY=\"'t5/spiece.model'\"."
            )
        if not {mixture_or_task_name, data_dir, min_bleu_score} <= {None}:
            from glimmer_jax.data import retrieved_tasks

            retrieved_tasks.configure(data_dir, min_bleu_score, vocabulary)
        self._model = model
        self._lengths = checks.lengths_for(model.config, task_feature_lengths)
        check_vocabulary_fits(model, vocabulary, allow_unused=allow_unused_embeddings)
        if mixture_or_task_name is not None:
            # seqio and tensorflow take seconds to import.
            from glimmer_jax.data import pipeline

            pipeline.import_tasks(mixture_or_task_module)
            pipeline.check_vocabulary(mixture_or_task_name, vocabulary)
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
        """seqio's, of the questions; T5X compares it with the task's."""
        return self._vocabulary.seqio()

    @property
    def output_vocabulary(self) -> Any:
        """seqio's, of the answers."""
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
        """The training loss and `{name: clu.metrics.Metric}`; see `GlimmerModel`."""
        return _with_clu_metrics(*self._model.loss_fn(params, batch, dropout_rng))

    def eval_fn(self, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """The loss without dropout."""
        return _with_clu_metrics(*self._model.eval_fn(params, batch))

    def predict_batch(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> jax.Array:
        """Answers, int32 `[B, T]`, 0 after the end token."""
        return self._model.predict_batch(params, batch, rng)

    def predict_batch_with_aux(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Answers and the arrays that metrics read: `GlimmerModel`'s, and `gold_passages` if known."""
        tokens, aux = self._model.predict_batch_with_aux(params, batch, rng)
        if "gold_passages" in batch:
            aux = {**aux, "gold_passages": batch["gold_passages"]}
        return tokens, aux

    def score_batch(self, params: Params, batch: Batch, return_intermediates: bool = False) -> Any:
        """log p(target) of each row, float32 `[B]`."""
        return self._model.score_batch(params, batch, return_intermediates)


def _with_clu_metrics(loss: jax.Array, sums: Mapping[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    from clu import metrics

    averages = {
        name: metrics.Average(total=total, count=weight) for name, (total, weight) in sums.items()
    }
    averages["loss"] = metrics.Average(total=loss, count=jnp.ones((), jnp.float32))
    return loss, averages


def factor_rules() -> Any:
    """`logical_factor_rules` for T5X's Adafactor: its own plus the axis names of our codebooks."""
    from t5x import adafactor

    # As in our own Adafactor, the second moments of codebooks are not factored.
    ours = dict.fromkeys((axes.CODEBOOK, axes.CODE, axes.CODE_CHANNEL), adafactor.FactorDim.NONE)
    return {**adafactor.standard_logical_factor_rules(), **ours}


def partitioner(mesh: MeshConfig = MeshConfig()) -> Any:
    """A `t5x.partitioning.PjitPartitioner` over our mesh, with our rule table.

    T5X's own partitioner enters `with mesh:`. JAX has deprecated that context, can forbid it
    (`jax_disallow_mesh_context_manager`), and ignores our models' activation constraints under it. This
    partitioner uses `jax.set_mesh` and also shards parameters over `fsdp`.
    """
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
