"""Checkpoints: what is kept, what is noticed, and that every bit comes back on any mesh."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.checkpoint import Checkpoints, best_step, steps_to_keep
from glimmer_jax.training.checksums import SIDECAR, verify_sidecar
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.params_file import load_params_file, save_params_file
from glimmer_jax.training.restore import find_step, restore_params
from glimmer_jax.training.source import load_initial_params, start_state
from glimmer_jax.training.state import TrainState, abstract_state, init_state
from tests.training.toy_model import ToyModel

MODEL = ToyModel()
OPTIMIZER = make_optimizer(OptimizerConfig(min_dim_size_to_factor=1), MODEL.param_names())


def fresh():
    return MODEL.init()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, model=2))


@pytest.fixture(scope="module")
def state(mesh):
    return init_state(fresh, OPTIMIZER, mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A folder with steps 2 and 4; do not write into it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, metadata={"seed": 0, "vocabulary_fingerprint": "v"}) as checkpoints:
        checkpoints.save(at_step(state, 2))
        checkpoints.save(at_step(state, 4), {"exact_match": 0.5})
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of it that may be spoilt."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def at_step(state, step):
    return TrainState(jax.numpy.int32(step), state.params, state.opt_state)


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


@pytest.mark.parametrize(
    "mesh_config, devices", [(MeshConfig(data=1), 1), (MeshConfig(data=1, fsdp=2, model=4), 8)]
)
def test_restored_on_another_mesh_every_bit_is_the_same(saved, state, mesh_config, devices):
    other = make_mesh(mesh_config, jax.devices()[:devices])
    target = abstract_state(OPTIMIZER, jax.eval_shape(fresh), other)
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(target)
    assert restored.step == 4 and restored.step.dtype == np.int32
    for wanted, leaf, spec in zip(
        jax.tree.leaves(at_step(state, 4)),
        jax.tree.leaves(restored),
        jax.tree.leaves(target),
        strict=True,
    ):
        np.testing.assert_array_equal(wanted, leaf)
        assert leaf.dtype == wanted.dtype and leaf.sharding == spec.sharding


def test_metadata_is_saved_with_each_step(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.metadata(4) == {
            "seed": 0,
            "vocabulary_fingerprint": "v",
            "step": 4,
            "dev_metrics": {"exact_match": 0.5},
        }


def test_parameters_are_read_without_the_rest(saved, state):
    for path in (saved, saved / "4", saved.parent):
        params = restore_params(path)
        jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    assert find_step(saved).name == "4"


def test_the_latest_and_the_best_are_kept(tmp_path, state):
    scores = {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.2, 5: None}
    assert steps_to_keep(scores, 2) == {2, 4, 5}
    assert steps_to_keep(scores, 1, best_is_max=False) == {1, 5}
    assert steps_to_keep({7: None}, 1) == {7} and best_step({7: None}) is None
    with Checkpoints(tmp_path, keep_latest=1, best_metric="em") as checkpoints:
        for step, em in ((1, 0.1), (2, 0.9), (3, 0.5), (4, None)):
            assert checkpoints.is_best(None if em is None else {"em": em}) == (step < 3)
            checkpoints.save(at_step(state, step), None if em is None else {"em": em})
            checkpoints.wait()
    with Checkpoints(tmp_path, keep_latest=1, best_metric="em") as checkpoints:
        assert checkpoints.steps() == [2, 4] and checkpoints.best_step() == 2
        with pytest.raises(ValueError, match=r"'em', and the evaluation returned \['f1'\]"):
            checkpoints.save(at_step(state, 5), {"f1": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_flipped_bit_is_named(damaged):
    victim = largest_file(damaged / "4" / "params")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=f"is damaged.*changed files.*{victim.name}"):
        restore_params(damaged)


def test_a_truncated_and_a_missing_file_are_named(damaged):
    victim = largest_file(damaged / "4" / "training")
    victim.write_bytes(victim.read_bytes()[:-1])
    (damaged / "4" / "metadata" / "metadata").unlink()
    with pytest.raises(ValueError, match=f"missing files .'metadata/metadata'.*{victim.name}"):
        verify_sidecar(damaged / "4")


def test_a_step_without_checksums_does_not_count(damaged, caplog):
    (damaged / "4" / SIDECAR).unlink()
    with pytest.raises(ValueError, match=r"no checksums\.json"):
        restore_params(damaged / "4")
    with caplog.at_level(logging.WARNING), Checkpoints(damaged) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert "was not finished" in caplog.text and not (damaged / "4").exists()


def test_arrays_of_another_model_are_named(saved, mesh):
    shapes = jax.eval_shape(fresh)
    shapes["output"]["kernel"] = jax.ShapeDtypeStruct((16, 64), np.float32)
    target = abstract_state(OPTIMIZER, shapes, mesh)
    message = r"output/kernel: wanted float32\[16, 64\], saved float32\[16, 32\]"
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(target)


def test_a_step_that_is_not_there_is_refused(saved, mesh, tmp_path):
    target = abstract_state(OPTIMIZER, jax.eval_shape(fresh), mesh)
    message = r"no finished checkpoint 3; it has \[2, 4\]"
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(target, 3)
    with pytest.raises(ValueError, match="is no checkpoint"):
        find_step(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="keep_latest must be at least 1"):
        Checkpoints(tmp_path, keep_latest=0)


def test_order_of_preference(saved, mesh, tmp_path):
    given = jax.tree.map(lambda x: np.full(x.shape, 2, x.dtype), jax.eval_shape(fresh))
    public = jax.tree.map(lambda x: x + 1, given)
    run = {"seed": 0, "vocabulary_fingerprint": "v"}

    def start(directory, **sources):
        with Checkpoints(directory, metadata=run) as checkpoints:
            state, source = start_state(checkpoints, OPTIMIZER, mesh, fresh, **sources)
        return int(state.step), float(state.params["output"]["kernel"][0, 0]), source

    both = dict(initial=lambda: given, public=lambda: public)
    assert start(saved, **both)[0] == 4
    assert start(tmp_path, **both) == (0, 2.0, "the given checkpoint")
    assert start(tmp_path, public=lambda: public) == (0, 3.0, "public weights")
    assert start(tmp_path)[2] == "random parameters"


def test_the_checkpoint_of_another_run_is_refused(saved, mesh):
    metadata = {"seed": 0, "vocabulary_fingerprint": "w"}
    with (
        Checkpoints(saved, metadata=metadata) as checkpoints,
        pytest.raises(ValueError, match="vocabulary_fingerprint 'v', and this one has 'w'"),
    ):
        start_state(checkpoints, OPTIMIZER, mesh, fresh)


def test_params_file_is_bfloat16_and_comes_back_as_float32(tmp_path, state):
    path = tmp_path / "glimmer.safetensors"
    save_params_file(path, state.params, {"model": {"emb_dim": 16}})
    params, config = load_initial_params(path)
    assert config == {"model": {"emb_dim": 16}}
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    assert path.stat().st_size < 2 * num_parameters + 2000

    def check(loaded, original):
        assert loaded.dtype == np.float32
        rounded = np.asarray(original.astype(jax.numpy.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(loaded, rounded)

    jax.tree.map(check, params, jax.device_get(state.params))


def test_a_damaged_params_file_is_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    save_params_file(path, {"a": np.ones(3, np.float32)}, {})
    content = json.loads(path.with_suffix(".json").read_text())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_params_file(path)
    assert set(content) == {"sha256"}
    path.unlink()
    with pytest.raises(ValueError, match=r"small.safetensors is missing"):
        load_params_file(path)
    with pytest.raises(ValueError, match=r"called NAME.safetensors"):
        save_params_file(tmp_path / "small.bin", {}, {})


def test_initial_parameters_come_from_a_run_too(saved, state):
    params, metadata = load_initial_params(saved)
    assert metadata["step"] == 4
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
