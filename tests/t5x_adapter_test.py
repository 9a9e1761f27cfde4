"""T5X's contract: names, signatures, axes and metrics; compared with T5X itself if installed."""

import dataclasses
import inspect
import os
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import unfreeze
from flax.linen.partitioning import get_axis_names

from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.modes.settings import DatasetConfig
from glimmer_jax.t5x_adapter import T5XModel, absolute_path, factor_rules, partitioner
from glimmer_jax.vocabulary import PYDOCS_MODEL
from tests.models import tiny

# `t5x.models.BaseModel`: methods and their arguments, in order. T5X looks for `rng` by name.
CONTRACT = {
    "get_initial_variables": ("rng", "input_shapes", "input_types"),
    "loss_fn": ("params", "batch", "dropout_rng"),
    "eval_fn": ("params", "batch"),
    "predict_batch": ("params", "batch", "rng"),
    "predict_batch_with_aux": ("params", "batch", "rng"),
    "score_batch": ("params", "batch", "return_intermediates"),
}
# Names of `t5x.adafactor.standard_logical_factor_rules`, and those that `factor_rules` adds.
STANDARD = {"vocab", "embed", "mlp", "heads", "kv", "joined_kv", "relpos_buckets", "layers"}
FACTORED = STANDARD | {"codebook", "code", "code_channel"}
LENGTHS = {"inputs": tiny.Q, "targets": tiny.T, "passages": (tiny.K, tiny.P)}
CODEBOOKS = dataclasses.replace(tiny.GLIMMER, memory_codec="pq")
FAMILY = {"fid": tiny.FID, "lumen": tiny.FROZEN, "glimmer": tiny.GLIMMER, "codebooks": CODEBOOKS}


class Vocabulary:
    """As many ids as the tiny models have rows."""

    path, vocab_size, eos_id, fingerprint = "v", tiny.V, 1, "sha256:v"

    def seqio(self):
        return self.path


def t5x_module(name):
    """A module of T5X; skips the test without T5X, which warns as it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"t5x.{name}")


def dataset(name=None, lengths=LENGTHS, **task):
    return DatasetConfig(name, lengths, batch_size=tiny.B, **task)


def adapter(config=tiny.GLIMMER):
    model = GlimmerModel(config, tiny.LIGHT_LOSS)
    return T5XModel(model, dataset(), optimizer_def="adafactor", vocabulary=Vocabulary())


@pytest.mark.parametrize("cls", [GlimmerModel, T5XModel])
@pytest.mark.parametrize("method", CONTRACT)
def test_methods_have_t5x_arguments_and_others_have_defaults(cls, method):
    parameters = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    wanted = CONTRACT[method]
    assert tuple(one.name for one in parameters[: len(wanted)]) == wanted
    assert all(one.default is not one.empty for one in parameters[len(wanted) :])
    assert "flax_mutables" not in {one.name for one in parameters}


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_every_parameter_names_axes_that_t5x_can_factor(config):
    shapes = {name: x.shape for name, x in tiny.batch().items()}
    init = adapter(config).get_initial_variables
    # T5X reads the model off the bound method.
    assert isinstance(init.__self__, T5XModel)
    variables = jax.eval_shape(lambda: init(rng=jax.random.key(0), input_shapes=shapes))
    assert variables.keys() == {"params", "params_axes"}

    def check(shape, names):
        assert len(names) == shape.ndim and set(names) <= FACTORED

    names = unfreeze(get_axis_names(variables["params_axes"]))
    jax.tree.map(check, variables["params"], names)


TARGETS = {"decoder_target_tokens": np.zeros((2, 5), np.int32)}


def test_metrics_are_clu_metrics_and_merge_like_sums(monkeypatch):
    pytest.importorskip("clu")
    sums = {"cross_entropy": (jnp.float32(6), jnp.float32(4)), "z_loss": (jnp.float32(1), 2.0)}
    for method in ("loss_fn", "eval_fn"):
        monkeypatch.setattr(GlimmerModel, method, lambda *_: (jnp.float32(3), sums))
    monkeypatch.delitem(sys.modules, "t5x.metrics", raising=False)
    loss, metrics = adapter().eval_fn({}, TARGETS)
    assert loss == 3
    assert {name: float(one.compute()) for name, one in metrics.items()} == {
        "cross_entropy": 1.5,
        "z_loss": 0.5,
        "loss": 3.0,
    }
    _, again = adapter().loss_fn({}, TARGETS, None)
    assert metrics["cross_entropy"].merge(again["z_loss"]).compute() == pytest.approx(7 / 6)


def test_metrics_have_t5x_names_and_values_under_t5x(monkeypatch):
    metrics_lib, models = t5x_module("metrics"), t5x_module("models")
    sums = {"cross_entropy": (6.0, 4.0), "z_loss": (1.0, 4.0), "token_accuracy": (3.0, 4.0)}
    sums = {name: tuple(map(jnp.float32, values)) for name, values in sums.items()}
    monkeypatch.setattr(GlimmerModel, "eval_fn", lambda *_: (jnp.float32(7), sums))
    _, metrics = adapter().eval_fn({}, TARGETS)
    # T5X's loss without normalisation is a sum over target tokens.
    theirs = models.compute_base_metrics(
        logits=jnp.zeros((2, 5, 3)),
        targets=jnp.zeros((2, 5), jnp.int32),
        mask=jnp.arange(10).reshape(2, 5) < 4,
        loss=jnp.float32(7),
        z_loss=jnp.float32(1),
    )
    assert theirs.keys() <= metrics.keys()
    both = [
        metrics_lib.set_step_metrics_num_steps(metrics_lib.set_time_metrics_duration(some, 2.0), 1)
        for some in (metrics, theirs)
    ]
    for name in theirs.keys() - {"accuracy"}:
        ours, wanted = (some[name].compute() for some in both)
        assert float(ours) == pytest.approx(float(wanted)), name
    assert metrics["accuracy"].compute() == 0.75


def test_decoder_arguments_of_t5x_select_search_and_beams():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch(gold=False)
    model = adapter()
    best, aux = model.predict_batch_with_aux(params, batch)
    ours = GlimmerModel(tiny.GLIMMER, decode=DecodeConfig(beams=3, length_penalty=0.0))
    wanted, _ = ours.predict_batch_with_aux(params, batch)
    beams, aux = model.predict_batch_with_aux(
        params, batch, decoder_params={"alpha": 0.0}, return_all_decodes=True, num_decodes=3
    )
    assert beams.shape == (tiny.B, 3, tiny.T) and aux["scores"].shape == (tiny.B, 3)
    np.testing.assert_array_equal(beams[:, -1], wanted)
    assert (np.diff(aux["scores"], axis=1) >= 0).all()
    alone, _ = model.predict_batch_with_aux(params, batch, return_all_decodes=True)
    np.testing.assert_array_equal(alone[:, 0], best)
    drawn = {"temperature": 1.0, "topk": 2, "topp": 0.0, "decode_rng": jax.random.key(0)}
    again, _ = model.predict_batch_with_aux(params, batch, decoder_params=drawn)
    assert again.shape == best.shape
    for settings, facts in (
        ({"decoder_params": {"max_decode_steps": 3}}, "max_decode_steps .*alpha"),
        ({"decoder_params": drawn, "num_decodes": 2}, "num_decodes=2 .*temperature=1.0"),
        ({"decoder_params": drawn, "rng": jax.random.key(1)}, "decode_rng"),
    ):
        with pytest.raises(ValueError, match=facts):
            model.predict_batch_with_aux(params, batch, **settings)


@pytest.mark.parametrize(("partitions", "submesh"), [(2, None), (None, (2, 1, 1, 1))])
def test_sizes_of_t5x_partitioner_are_rejected(partitions, submesh):
    given = SimpleNamespace(_num_partitions=partitions, _model_parallel_submesh=submesh)
    with pytest.raises(ValueError, match="num_partitions.*model_parallel_submesh.*MESH_MODEL"):
        partitioner(configured=given)


def test_local_paths_become_absolute():
    here = os.getcwd()
    assert absolute_path("runs/a") == f"{here}/runs/a" and absolute_path(None) is None
    assert absolute_path(["a", "gs://b/c"]) == [f"{here}/a", "gs://b/c"]


def test_predictions_carry_the_arrays_that_metrics_read():
    abstract = tiny.abstract(tiny.GLIMMER)[0]
    tokens, aux = jax.eval_shape(adapter().predict_batch_with_aux, abstract, tiny.batch())
    assert tokens.shape == (tiny.B, tiny.T) and tokens.dtype == jnp.int32
    assert {name: x.shape for name, x in aux.items()} == {
        "scores": (tiny.B,),
        "passage_scores": (tiny.B, tiny.K),
        "kept_passages": (tiny.B, 2),
        "gold_passages": (tiny.B, tiny.K),
    }
    _, aux = jax.eval_shape(adapter().predict_batch_with_aux, abstract, tiny.batch(gold=False))
    assert "gold_passages" not in aux


def test_frozen_memory_has_zero_gradients_under_any_trainer():
    params = tiny.params(tiny.FROZEN)
    _, grads = tiny.loss_and_grad(tiny.FROZEN, tiny.LIGHT_LOSS)(params, tiny.batch())
    frozen = GlimmerModel(tiny.FROZEN).frozen(params)
    still = [
        not np.asarray(grad).any()
        for grad, is_frozen in zip(jax.tree.leaves(grads), jax.tree.leaves(frozen), strict=True)
        if is_frozen
    ]
    assert still and all(still)


def test_t5x_cannot_train_codebooks():
    config = dataclasses.replace(CODEBOOKS, train_codebooks=True)
    with pytest.raises(ValueError, match="TRAIN_CODEBOOKS.*run_mode=train"):
        adapter(config)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"label_smoothing": 0.1}, "LABEL_SMOOTHING=0.1 .*Z_LOSS"),
        ({"loss_normalizing_factor": 233472}, "LOSS_NORMALIZING_FACTOR=233472 .*LEARNING_RATE"),
        ({"vocabulary": object()}, "VOCABULARY .*path.*--gin.VOCABULARY="),
        ({"dataset": dataset("any", min_bleu_score=2.0)}, "MIN_BLEU_SCORE.*2.0"),
    ],
)
def test_t5x_settings_without_counterpart_are_rejected(settings, facts):
    given = {"dataset": dataset(), "vocabulary": Vocabulary(), **settings}
    with pytest.raises(ValueError, match=facts):
        T5XModel(GlimmerModel(tiny.GLIMMER), **given)


def test_a_task_with_another_vocabulary_is_rejected(tmp_path):
    seqio = pytest.importorskip("seqio")
    from glimmer_jax.data import generated_tasks, retrieved_tasks
    from glimmer_jax.vocabulary import Vocabulary as SentencePiece

    generated_tasks.register("with_pydocs", lambda: None, SentencePiece("pydocs"))
    task = dataset("with_pydocs", data_dir="d")
    with pytest.raises(ValueError, match="VOCABULARY.* v,.*with_pydocs"):
        T5XModel(GlimmerModel(tiny.GLIMMER), task, vocabulary=Vocabulary())
    config = dataclasses.replace(tiny.T5, vocab_size=2048)
    model = GlimmerModel(dataclasses.replace(tiny.GLIMMER, t5=config))
    made = T5XModel(model, task, vocabulary="pydocs")
    assert retrieved_tasks.settings().data_dir == "d"
    features = seqio.get_mixture_or_task("with_pydocs").output_features
    assert made.input_vocabulary == features["inputs"].vocabulary
    # The same file at another path.
    copy = tmp_path / "copy.model"
    copy.write_bytes(PYDOCS_MODEL.read_bytes())
    made = T5XModel(model, task, vocabulary=str(copy))
    assert made.output_vocabulary == features["targets"].vocabulary
    retrieved_tasks.configure()


def test_settings_that_do_not_fit_are_rejected_before_t5x_starts():
    model = GlimmerModel(tiny.GLIMMER)
    few = dataset(lengths={**LENGTHS, "passages": (1, 6)})
    with pytest.raises(ValueError, match="keeps 2 passages"):
        T5XModel(model, few, vocabulary=Vocabulary())
    with pytest.raises(ValueError, match="2048 .*32 .*VOCAB_SIZE"):
        T5XModel(model, dataset(), vocabulary="pydocs")
    with pytest.raises(ValueError, match="VOCABULARY is required"):
        T5XModel(model, dataset())
    with pytest.raises(ValueError, match="PASSAGES_DIR: no folder nowhere"):
        T5XModel(model, dataset(), passages_dir="nowhere", vocabulary=Vocabulary())


def test_the_contract_equals_that_of_t5x():
    models, adafactor = t5x_module("models"), t5x_module("adafactor")
    assert isinstance(adapter(), models.BaseTransformerModel)
    for method, wanted in CONTRACT.items():
        names = tuple(inspect.signature(getattr(models.BaseModel, method)).parameters)[1:]
        assert names == wanted, method
    assert set(adafactor.standard_logical_factor_rules()) >= STANDARD
    assert set(factor_rules()) >= FACTORED


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
def test_t5x_adafactor_has_a_state_for_every_parameter(config):
    adafactor = t5x_module("adafactor")
    shapes = {name: x.shape for name, x in tiny.batch().items()}
    init = adapter(config).get_initial_variables
    variables = jax.eval_shape(lambda: init(rng=jax.random.key(0), input_shapes=shapes))
    optimizer = adafactor.Adafactor(1e-3, logical_factor_rules=factor_rules())
    optimizer.set_param_axes(unfreeze(get_axis_names(variables["params_axes"])))
    state = jax.eval_shape(optimizer.init_state, variables["params"])
    assert len(jax.tree.leaves(state.param_states)) >= len(jax.tree.leaves(variables["params"]))
