"""Initial states: the order of preference, and which settings a resumed run must keep."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.restore import check_resume_compatible, restore
from glimmer_jax.training.state import TrainState
from glimmer_jax.weights import huggingface, parameters
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny


def test_order_of_preference(tmp_path):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = GlimmerModel(tiny.GLIMMER)
    shapes, names = model.abstract_variables()
    optimizer = make_optimizer(OptimizerConfig(), names)
    metadata = {"seed": 0, **describe(tiny.GLIMMER, "v")}

    def constant_params(value):
        return lambda: jax.tree.map(lambda x: jax.numpy.full(x.shape, value, x.dtype), shapes)

    def restored(run, path=None):
        load = None if path is None else lambda: parameters.load(path, model, "v")
        with Checkpoints(run, metadata=metadata) as checkpoints:
            return restore(checkpoints, optimizer, mesh, constant_params(4.0), load)

    def constant_fid(value):
        return jax.tree.map(lambda x: np.full(x.shape, value, "f"), tiny.params(tiny.FID))

    def embedding(state):
        return float(state.params["token_embedder"]["embedding"][0, 0])

    run, checkpoint, t5 = (tmp_path / name for name in ("run", "lumen.safetensors", "t5"))
    lumen = jax.tree.map(lambda x: np.full(x.shape, 2.0, "f"), tiny.params(tiny.LUMEN))
    save_params_file(checkpoint, lumen, describe(tiny.LUMEN, "v"))
    huggingface.save(t5, constant_fid(3.0), tiny.FID, describe(tiny.FID, "v"))

    state, source = restored(run)  # 4. Random parameters.
    assert (int(state.step), embedding(state), source) == (0, 4.0, "random parameters")
    for path, value in ((t5, 3.0), (checkpoint, 2.0)):  # 3. A public T5. 2. A given checkpoint.
        state, source = restored(run, path)
        assert (int(state.step), embedding(state)) == (0, value)
        assert source == "INITIAL_CHECKPOINT_PATH"
    with Checkpoints(run, metadata=metadata) as checkpoints:
        checkpoints.save(
            TrainState(jax.numpy.int32(7), constant_params(1.0)(), optimizer.init(state.params))
        )
    # 1. The run's own checkpoint. The given one is not even opened.
    state, source = restored(run, tmp_path / "deleted")
    assert (int(state.step), embedding(state)) == (7, 1.0)
    assert source == f"step 7 of {run}"


def settings(config=tiny.GLIMMER, **changes):
    """The metadata of a run."""
    data = {
        "data_order": 2,
        "mixture_or_task_name": "a",
        "batch_size": 8,
        "task_feature_lengths": {"passages": (3, 6)},
        "initial_checkpoint_path": "t5",
        "schedule_end": 100,
        "min_bleu_score": 0.5,
        "use_cached_tasks": False,
    }
    return {**describe(config, "v"), **data, **changes}


def with_t5(**changes):
    return dataclasses.replace(tiny.GLIMMER, t5=dataclasses.replace(tiny.T5, **changes))


SAVED = json.loads(json.dumps(settings()))


@pytest.mark.parametrize(
    ("setting", "current", "values"),
    [
        ("vocabulary_fingerprint", settings(vocabulary_fingerprint="w"), ("'v'", "'w'")),
        ("data_order", settings(data_order=3), ("2", "3")),
        ("batch_size", settings(batch_size=16), ("8", "16")),
        ("initial_checkpoint_path", settings(initial_checkpoint_path="b"), ("'t5'", "'b'")),
        ("min_bleu_score", settings(min_bleu_score=0.1), ("0.5", "0.1")),
        ("use_cached_tasks", settings(use_cached_tasks=True), ("False", "True")),
        ("schedule_end", settings(schedule_end=200), ("100", "200")),
        ("mixture_or_task_name", settings(mixture_or_task_name="b"), ("'a'", "'b'")),
        ("task_feature_lengths", settings(task_feature_lengths={"passages": (4, 6)}), ("3", "4")),
        ("mlp_activations", settings(with_t5(mlp_activations=("relu",))), ("gelu", "relu")),
        ("relpos_max_distance", settings(with_t5(relpos_max_distance=64)), ("128", "64")),
        ("num_kept", settings(dataclasses.replace(tiny.GLIMMER, num_kept=1)), ("2", "1")),
    ],
)
def test_a_changed_setting_is_named_with_both_values(setting, current, values):
    message = f"MODEL_DIR.*DIR.*{setting} was .*{values[0]}.* now .*{values[1]}"
    with pytest.raises(ValueError, match=message):
        check_resume_compatible(SAVED, current, "DIR")


def test_numerics_and_unrecorded_settings_are_not_compared():
    check_resume_compatible(SAVED, settings(), "DIR")
    numerics = with_t5(dropout_rate=0.1, dtype="bfloat16", remat_policy="full")
    check_resume_compatible(SAVED, settings(numerics), "DIR")
    check_resume_compatible({"data_order": 2}, settings(), "DIR")  # records nothing else


def test_a_run_with_the_order_of_an_older_version_is_rejected():
    with pytest.raises(ValueError, match="MODEL_DIR.*DIR.*data_order was 1 .*now 2.*another order"):
        check_resume_compatible({"step": 3}, settings(), "DIR")
    check_resume_compatible({"step": 3}, {"batch_size": 8}, "DIR")  # without tasks
