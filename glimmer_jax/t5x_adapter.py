"""Our models for T5X's `train`, `eval` and `infer`, where T5X is installed; see docs/t5x.md.

`T5XModel` has the methods of `t5x.models.BaseModel`, `partitioner` gives T5X our mesh and rule table.
T5X, clu and seqio are imported when T5X asks for what needs them, never when this module is imported.
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


class T5XModel:
    """FiD, LUMEN or GLIMMER with the methods of `t5x.models.BaseModel`. Passages are read as tokens."""

    def __init__(
        self,
        model: GlimmerModel,
        task_feature_lengths: Mapping[str, Any],
        passages_dir: str | None = None,
        optimizer_def: Any = None,
        vocabulary: Vocabulary = Vocabulary(),
    ):
        """Checks what can be checked before anything is compiled.

        Args:
          model: FiD, LUMEN or GLIMMER.
          task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
          passages_dir: passages folder for tasks with `passage_ids`.
          optimizer_def: a `t5x.optimizers.OptimizerDef`; None for eval and infer.
          vocabulary: of tasks and passages.

        Raises:
          ValueError: lengths, vocabulary or passages that do not fit the model.
        """
        self._model = model
        self._lengths = checks.lengths_for(model.config, task_feature_lengths)
        checks.vocabulary_fits(model, vocabulary)
        self._vocabulary = vocabulary
        self._passages = None
        if passages_dir is not None:
            self._passages = Passages.open(passages_dir, vocabulary.fingerprint)
            self._passages.warn_of_cuts(self._lengths.passage)
        self.optimizer_def = optimizer_def

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:  # noqa: N802 (T5X's name)
        """Makes the seqio feature converter; T5X calls it with `pack`, which must be False."""
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
        """Answers, and what metrics read: `GlimmerModel`'s, and `gold_passages` where known."""
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
    """`logical_factor_rules` for T5X's Adafactor: its own, and our names that it does not know."""
    from t5x import adafactor

    # As our own Adafactor has them: the moments of codebooks are kept whole.
    ours = dict.fromkeys((axes.CODEBOOK, axes.CODE, axes.CODE_CHANNEL), adafactor.FactorDim.NONE)
    return {**adafactor.standard_logical_factor_rules(), **ours}


def partitioner(mesh: MeshConfig = MeshConfig()) -> Any:
    """A `t5x.partitioning.PjitPartitioner` over our mesh, with our rule table.

    T5X's own enters `with mesh:`, which jax has deprecated and can forbid
    (`jax_disallow_mesh_context_manager`), and which leaves our models' activations unconstrained. This
    one uses `jax.set_mesh`, and shards parameters over `fsdp` as well.
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
        # None means whole on every device to T5X, and whatever the compiler likes to jit.
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
    """A jitted function that is called and lowered with the mesh in scope, as T5X calls and lowers."""

    def __init__(self, jitted: Any, mesh: jax.sharding.Mesh):
        self._jitted = jitted
        self._mesh = mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted(*args)

    def lower(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)
