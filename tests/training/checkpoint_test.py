"""Checkpoints: what is kept, what is noticed, and that every bit comes back on any mesh."""

import logging
import shutil
import threading

import jax
import numpy as np
import pytest
from etils import epath

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.checkpoint import Checkpoints, steps_to_keep
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import TrainState, abstract_state, init_state
from glimmer_jax.weights.checksums import SIDECAR, verify_sidecar
from glimmer_jax.weights.load import load
from glimmer_jax.weights.steps import best_step, find_step, restore_params
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
        loaded = load(path)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(state.params))
        assert loaded.config is None and loaded.vocabulary_fingerprint == "v"
        assert loaded.what.startswith(f"step 4 of {saved}")


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
        load(damaged)


def test_a_truncated_and_a_missing_file_are_named(damaged):
    victim = largest_file(damaged / "4" / "training")
    victim.write_bytes(victim.read_bytes()[:-1])
    (damaged / "4" / "metadata" / "metadata").unlink()
    with pytest.raises(ValueError, match=f"missing files .'metadata/metadata'.*{victim.name}"):
        verify_sidecar(damaged / "4")


def test_a_damaged_newest_step_makes_way_for_the_one_before_it(damaged, state, mesh, caplog):
    victim = largest_file(damaged / "4" / "training")
    victim.write_bytes(victim.read_bytes()[:-1])
    target = abstract_state(OPTIMIZER, jax.eval_shape(fresh), mesh)
    with caplog.at_level(logging.WARNING), Checkpoints(damaged) as checkpoints:
        restored = checkpoints.restore(target)
        assert int(restored.step) == 2 and checkpoints.steps() == [2]
        # The run comes to the same step again.
        checkpoints.save(at_step(state, 4))
        assert checkpoints.steps() == [2, 4]
    assert victim.name in caplog.text and "Going on from the step before it" in caplog.text
    assert (damaged / "damaged" / "4" / "training").exists()


def test_where_all_steps_are_damaged_nothing_is_moved(damaged):
    for step in ("2", "4"):
        largest_file(damaged / step / "params").unlink()
    with pytest.raises(ValueError, match=r"every step is damaged: .*Copy one again"):
        Checkpoints(damaged)
    assert sorted(path.name for path in damaged.iterdir()) == ["2", "4"]


def test_what_a_killed_writer_left_is_put_aside_and_kept(damaged, state, caplog):
    (damaged / "4" / SIDECAR).unlink()
    with pytest.raises(ValueError, match=r"no checksums\.json"):
        restore_params(damaged / "4")
    assert find_step(damaged).folder.name == "2"
    for number, aside in enumerate(("4", "4+")):
        with caplog.at_level(logging.WARNING), Checkpoints(damaged) as checkpoints:
            assert checkpoints.latest_step() == 2
            if number == 0:
                checkpoints.save(at_step(state, 4))
        assert "was not finished" in caplog.text
        assert largest_file(damaged / "unfinished" / aside / "params").stat().st_size > 0
        (damaged / "4" / SIDECAR).unlink(missing_ok=True)


def test_a_deletion_that_was_cut_short_is_finished_at_the_next_start(damaged, state, monkeypatch):
    removed = []

    def cut_short(self):
        # As a bucket's, one object after the other; the checksums are among the first.
        (self / SIDECAR).unlink()
        removed.append(self.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epath.Path, "rmtree", cut_short)
        patch.setattr(type(epath.Path(damaged)), "rmtree", cut_short)
        checkpoints = Checkpoints(damaged, keep_latest=1)
        checkpoints.save(at_step(state, 6))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
    assert removed == ["2"] and (damaged / "2").is_dir()
    with Checkpoints(damaged, keep_latest=2) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    assert not (damaged / "2").exists() and not (damaged / "deleted").exists()


def test_a_copy_without_checksums_is_refused_and_left_as_it_is(damaged):
    (damaged / "2" / SIDECAR).unlink()
    for steps in (r"\[2\] of \[2, 4\]", r"\[2, 4\] of \[2, 4\]"):
        with pytest.raises(ValueError, match=f"steps {steps} have no checksums.json; more than"):
            Checkpoints(damaged)
        (damaged / "4" / SIDECAR).unlink(missing_ok=True)
    assert sorted(path.name for path in damaged.iterdir()) == ["2", "4"]


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


def test_readers_take_the_best_step_of_a_run_that_named_a_metric(tmp_path, state):
    run = dict(keep_latest=2, best_metric="loss", best_is_max=False)
    with Checkpoints(tmp_path / "checkpoints", **run) as checkpoints:
        checkpoints.save(at_step(state, 1))
        checkpoints.wait()
        assert find_step(tmp_path).why == "the newest"
        for step, loss in ((2, 0.5), (3, 0.5), (4, 0.9)):
            checkpoints.save(at_step(state, step), {"loss": loss})
        assert checkpoints.latest_step() == 4
    found = find_step(tmp_path)
    assert (found.folder.name, found.why) == ("2", "the best by dev metric loss, 0.5")
    assert load(tmp_path).what.startswith("step 2 of ")
    assert find_step(tmp_path / "checkpoints" / "3").why == "the step given"


def test_the_score_of_a_step_counts_as_soon_as_it_is_being_saved(tmp_path, state, monkeypatch):
    begin = threading.Event()
    finish = Checkpoints._finish

    def slow(self, *args):
        assert begin.wait(30)
        finish(self, *args)

    monkeypatch.setattr(Checkpoints, "_finish", slow)
    with Checkpoints(tmp_path, best_metric="em") as checkpoints:
        checkpoints.save(at_step(state, 1), {"em": 0.5})
        assert not checkpoints.is_best({"em": 0.4}) and checkpoints.is_best({"em": 0.6})
        assert not checkpoints.is_best({"em": float("nan")})
        begin.set()
        assert checkpoints.steps() == [1]


def test_a_step_that_could_not_be_saved_is_raised_and_forgotten(tmp_path, state, monkeypatch):
    def fail(self, *args):
        raise OSError("disk full")

    monkeypatch.setattr(Checkpoints, "_finish", fail)
    checkpoints = Checkpoints(tmp_path, best_metric="em")
    checkpoints.save(at_step(state, 1), {"em": 0.5})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    assert checkpoints.latest_step() is None and checkpoints.is_best({"em": 0.1})
    checkpoints.close()
