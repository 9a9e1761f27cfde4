"""Checkpoints: which are kept, how damage is handled, and bit-exact restoring on any mesh."""

import json
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
from glimmer_jax.weights import checksums
from glimmer_jax.weights.checksums import (
    SIDECAR,
    DamagedCheckpoint,
    verify_sidecar,
    write_sidecar,
)
from glimmer_jax.weights.load import load
from glimmer_jax.weights.steps import best_step, find_step, restore_params
from tests.damage import SPECIAL_FILES
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
    """A copy of it that a test may damage."""
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
def test_a_step_restores_bit_exactly_on_another_mesh(saved, state, mesh_config, devices):
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


def test_parameters_are_read_without_the_optimiser_state(saved, state):
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
        with pytest.raises(ValueError, match=r"BEST_METRIC='em'.*\['f1'\]"):
            checkpoints.save(at_step(state, 5), {"f1": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_flipped_bit_is_reported(damaged):
    victim = largest_file(damaged / "4" / "params")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=f"damaged.*changed files.*{victim.name}"):
        load(damaged)


def test_truncated_and_missing_files_are_reported(damaged):
    victim = largest_file(damaged / "4" / "training")
    victim.write_bytes(victim.read_bytes()[:-1])
    (damaged / "4" / "metadata" / "metadata").unlink()
    with pytest.raises(ValueError, match=f"missing files.*metadata/metadata.*{victim.name}"):
        verify_sidecar(damaged / "4")


@pytest.mark.timeout(60)
def test_links_to_folders_are_not_followed(damaged):
    for name in ("a", "b"):
        (damaged / "4" / name).symlink_to(".")
    with pytest.raises(ValueError, match="4/a is a symbolic link to a folder"):
        verify_sidecar(damaged / "4")


def test_a_damaged_newest_step_is_skipped_and_kept(damaged, state, mesh, caplog):
    victim = largest_file(damaged / "4" / "training")
    victim.write_bytes(victim.read_bytes()[:-1])
    target = abstract_state(OPTIMIZER, jax.eval_shape(fresh), mesh)
    with caplog.at_level(logging.WARNING), Checkpoints(damaged) as checkpoints:
        restored = checkpoints.restore(target)
        assert int(restored.step) == 2 and checkpoints.steps() == [2]
        # The run reaches the same step again.
        checkpoints.save(at_step(state, 4))
        assert checkpoints.steps() == [2, 4]
    assert victim.name in caplog.text and "Using step 2 instead" in caplog.text
    assert (damaged / "damaged" / "4" / "training").exists()


def test_if_every_step_is_damaged_nothing_is_moved(damaged):
    for step in ("2", "4"):
        largest_file(damaged / step / "params").unlink()
    with pytest.raises(ValueError, match="every step .*damaged.*Copy"):
        Checkpoints(damaged)
    assert sorted(path.name for path in damaged.iterdir()) == ["2", "4"]


def test_an_unfinished_step_is_moved_aside_and_kept(damaged, state, caplog):
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


def test_an_interrupted_deletion_is_completed_at_the_next_start(damaged, state, monkeypatch):
    removed = []

    def interrupt(self):
        # A bucket deletes one object after the other; the checksums are among the first.
        (self / SIDECAR).unlink()
        removed.append(self.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epath.Path, "rmtree", interrupt)
        patch.setattr(type(epath.Path(damaged)), "rmtree", interrupt)
        checkpoints = Checkpoints(damaged, keep_latest=1)
        checkpoints.save(at_step(state, 6))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
    assert removed == ["2"] and (damaged / "2").is_dir()
    with Checkpoints(damaged, keep_latest=2) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    assert not (damaged / "2").exists() and not (damaged / "deleted").exists()


def test_a_link_to_a_step_is_removed_and_its_target_kept(damaged, state, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (damaged / "2").rename(elsewhere)
    (damaged / "2").symlink_to(elsewhere)
    with Checkpoints(damaged, keep_latest=1) as checkpoints:
        checkpoints.save(at_step(state, 6))
    assert not (damaged / "2").is_symlink() and any(elsewhere.iterdir())
    assert sorted(path.name for path in damaged.iterdir()) == ["6", "deleted"]


def test_an_older_step_without_checksums_is_reported(damaged, caplog):
    (damaged / "2" / SIDECAR).unlink()
    assert find_step(damaged).folder.name == "4"
    assert f"checkpoints/2 has no {SIDECAR}. It is not considered" in caplog.text


def test_a_copy_without_checksums_is_rejected_and_kept(damaged):
    for step in ("2", "4"):
        (damaged / step / SIDECAR).unlink()
    with pytest.raises(ValueError, match=r"\[2, 4\].*checksums.json"):
        Checkpoints(damaged)
    assert sorted(path.name for path in damaged.iterdir()) == ["2", "4"]


def rewrite_metadata(folder, **changes):
    path = folder / "metadata" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


OLD_STEP_DAMAGE = {
    "one byte of its metadata": lambda step: (step / "metadata/metadata").write_bytes(b"{"),
    "an edited dev metric": lambda step: rewrite_metadata(step, dev_metrics={"exact_match": 9.0}),
    "no checksums": lambda step: (step / SIDECAR).unlink(),
    "an empty checksum file": lambda step: (step / SIDECAR).write_bytes(b""),
    "other keys in its checksums": lambda step: (step / SIDECAR).write_text('{"md5": {}}'),
}


@pytest.mark.parametrize("damage", OLD_STEP_DAMAGE)
def test_a_damaged_older_step_is_reported_and_ignored(damaged, caplog, damage):
    OLD_STEP_DAMAGE[damage](damaged / "2")
    assert load(damaged).what.startswith("step 4 ")
    run = dict(keep_latest=1, best_metric="exact_match")
    with caplog.at_level(logging.WARNING), Checkpoints(damaged, **run) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([4], 4)
    assert str(damaged / "2") in caplog.text and "Using step 4" in caplog.text
    assert (damaged / "damaged" / "2" / "params").exists()


def test_an_edited_dev_metric_does_not_delete_the_best_step(tmp_path, state):
    run = dict(keep_latest=1, best_metric="em")
    with Checkpoints(tmp_path, **{**run, "keep_latest": 9}) as checkpoints:
        for step, em in ((1, 0.8), (2, 0.3), (3, 0.5)):
            checkpoints.save(at_step(state, step), {"em": em})
    rewrite_metadata(tmp_path / "2", dev_metrics={"em": 0.9})
    assert find_step(tmp_path).folder.name == "1"
    with Checkpoints(tmp_path, **run) as checkpoints:
        checkpoints.save(at_step(state, 4), {"em": 0.6})
        assert checkpoints.steps() == [1, 4] and checkpoints.best_step() == 1


@pytest.mark.parametrize("writes", range(4))
def test_dev_metrics_that_are_added_late_leave_the_step_intact_at_any_kill(
    tmp_path, state, monkeypatch, writes
):
    run = dict(keep_latest=1, best_metric="em")
    with Checkpoints(tmp_path, **run) as checkpoints:
        checkpoints.save(at_step(state, 3))
    done, write = [], checksums._write

    def killed(path, data):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(path)
        write(path, data)

    checkpoints = Checkpoints(tmp_path, **run)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_write", killed)
        if writes < 3:
            with pytest.raises(KeyboardInterrupt):
                checkpoints.add_dev_metrics(3, {"em": 0.5})
        else:
            checkpoints.add_dev_metrics(3, {"em": 0.5})
    checkpoints.close()
    with Checkpoints(tmp_path, **run) as checkpoints:
        assert checkpoints.steps() == [3]
        assert checkpoints.metadata(3)["dev_metrics"] == ({"em": 0.5} if writes > 1 else {})
        checkpoints.add_dev_metrics(3, {"em": 0.5})
        assert checkpoints.metadata(3)["dev_metrics"] == {"em": 0.5}
    rewrite_metadata(tmp_path / "3", dev_metrics={"em": 0.9})
    with pytest.raises(DamagedCheckpoint, match="metadata is changed"):
        find_step(tmp_path)


@pytest.mark.fault
def test_signed_metadata_of_other_types_is_damage(damaged, caplog):
    file = damaged / "4" / "metadata" / "metadata"
    intact = json.loads(file.read_text())
    hostile = {
        "step": ["4", 4.0, None, True],
        "dev_metrics": [None, [], {"em": "0.5"}, {"em": None}, {"em": 10**400}, {"em": True}],
        "best_metric": [7, [], {}, {"name": 7, "is_max": True}, {"name": "em", "is_max": 1}],
    }
    texts = [json.dumps({**intact, key: x}) for key, values in hostile.items() for x in values]
    for text in (*texts, "[]", "[" * 100_000, "1" * 5000, ""):
        file.write_text(text)
        write_sidecar(damaged / "4")
        with pytest.raises(DamagedCheckpoint, match=r"checkpoints/4 is damaged: .*dev metrics"):
            find_step(damaged)
    with Checkpoints(damaged) as checkpoints:
        assert checkpoints.steps() == [2]
    assert "Using step 2 instead" in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", [SIDECAR, "params/manifest.ocdbt"])
def test_what_is_no_file_is_rejected_without_blocking(damaged, kind, name):
    SPECIAL_FILES[kind](damaged / "4" / name)
    with pytest.raises(ValueError, match="checkpoints/4 "):
        restore_params(damaged / "4")


def test_folders_that_are_not_named_like_steps_are_ignored(damaged):
    for name in ("\u00b2", "\u0664", "007", "-1", "9" * 30):
        shutil.copytree(damaged / "2", damaged / name)
    assert find_step(damaged).folder.name == "4"
    with Checkpoints(damaged) as checkpoints:
        assert checkpoints.steps() == [2, 4]


def test_a_step_under_the_name_of_another_is_rejected(damaged, state, mesh):
    shutil.copytree(damaged / "2", damaged / "6")
    with pytest.raises(DamagedCheckpoint, match="6 is damaged.*step 2"):
        load(damaged)
    with Checkpoints(damaged) as checkpoints:
        assert checkpoints.steps() == [2, 4]


def test_arrays_of_another_model_are_reported(saved, mesh):
    shapes = jax.eval_shape(fresh)
    shapes["output"]["kernel"] = jax.ShapeDtypeStruct((16, 64), np.float32)
    target = abstract_state(OPTIMIZER, shapes, mesh)
    message = r"output/kernel: expected float32\[16, 64\], saved float32\[16, 32\]"
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(target)


def test_a_missing_step_is_rejected(saved, mesh, tmp_path):
    target = abstract_state(OPTIMIZER, jax.eval_shape(fresh), mesh)
    message = r"no finished checkpoint 3.*\[2, 4\]"
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(target, 3)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        find_step(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="keep_latest.*1.*0"):
        Checkpoints(tmp_path, keep_latest=0)


def test_readers_use_the_best_step_of_a_run_with_a_metric(tmp_path, state):
    run = dict(keep_latest=2, best_metric="loss", best_is_max=False)
    with Checkpoints(tmp_path / "checkpoints", **run) as checkpoints:
        checkpoints.save(at_step(state, 1))
        checkpoints.wait()
        assert find_step(tmp_path).why == "the newest"
        for step, loss in ((2, 0.5), (3, 0.5), (4, 0.9)):
            checkpoints.save(at_step(state, step), {"loss": loss})
        assert checkpoints.latest_step() == 4
    step = find_step(tmp_path)
    assert (step.folder.name, step.why) == ("2", "the best by dev metric loss, 0.5")
    assert load(tmp_path).what.startswith("step 2 of ")
    assert find_step(tmp_path / "checkpoints" / "3").why == "the given step"


def test_the_score_of_a_step_counts_while_it_is_being_saved(tmp_path, state, monkeypatch):
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


def test_a_failed_save_is_raised_and_forgotten(tmp_path, state, monkeypatch):
    def fail(self, *args):
        raise OSError("disk full")

    monkeypatch.setattr(Checkpoints, "_finish", fail)
    checkpoints = Checkpoints(tmp_path, best_metric="em")
    checkpoints.save(at_step(state, 1), {"em": 0.5})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    assert checkpoints.latest_step() is None and checkpoints.is_best({"em": 0.1})
    checkpoints.close()
