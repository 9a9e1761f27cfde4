"""Mode `train`: checks before the first step, and resuming from memory."""

import shutil

import numpy as np
import pytest

from glimmer_jax.axes import Lengths
from glimmer_jax.modes.train import _is_new, check_best_metric
from tests.main_test import clear, data, run, train, work  # noqa: F401 (fixtures)

LENGTHS = Lengths(question=4, target=5, passages=3, passage=6)
ONE_TASK = {"MIXTURE_OR_TASK_NAME": "pydocs_which_function"}


class Dev:
    """An evaluation that checks the answers it gets."""

    def __init__(self, *names):
        self.names = names

    def run(self, predict):
        batch = {"question_tokens": np.ones((2, 4)), "gold_passages": np.ones((2, 3))}
        tokens, aux = predict(batch)
        assert tokens.shape == (2, 5) and aux["kept_passages"].tolist() == [[0, 1], [0, 1]]
        assert aux["passage_scores"].shape == aux["gold_passages"].shape == (2, 3)
        return dict.fromkeys(self.names, 0.0)


def test_an_unknown_best_metric_is_rejected_before_training():
    check_best_metric("mean", Dev("a/exact_match"), LENGTHS, num_kept=2)
    check_best_metric("a/f1", Dev("a/f1"), LENGTHS, num_kept=2)
    message = r"BEST_METRIC='mean' .*exact_match and accuracy.*\['a/f1'\]"
    with pytest.raises(ValueError, match=message):
        check_best_metric("mean", Dev("a/f1"), LENGTHS, num_kept=2)


def test_a_run_is_new_until_it_has_a_step(tmp_path):
    assert _is_new(str(tmp_path))
    # What creating the folder leaves in a bucket, and what a killed save leaves.
    (tmp_path / "checkpoints" / "unfinished" / "10").mkdir(parents=True)
    assert _is_new(str(tmp_path)) and _is_new(f"file://{tmp_path}")
    (tmp_path / "checkpoints" / "10").mkdir()
    assert not _is_new(str(tmp_path)) and not _is_new(f"file://{tmp_path}")


def test_a_run_from_memory_resumes_without_its_initial_checkpoint(
    work,  # noqa: F811
    tmp_path,
    capfd,
    caplog,
):
    first, lumen = tmp_path / "first", ("examples/pydocs_lumen_train",)
    shared = {**ONE_TASK, "TRAIN_STEPS": 1}
    assert train(work, first, *lumen, **shared) == 0
    memory = {"MEMORY_DIR": str(tmp_path / "memory"), "PASSAGES_DIR": data(work)["PASSAGES_DIR"]}
    built = {"CHECKPOINT_PATH": str(first), "BATCH_SIZE": 2, **memory}
    assert run("build_memory", "runs/build_memory", **built) == 0
    shared = {**ONE_TASK, **memory, "INITIAL_CHECKPOINT_PATH": str(first), "SCHEDULE": "constant"}
    assert train(work, tmp_path / "run", *lumen, **shared, TRAIN_STEPS=1) == 0

    # Another batch size is rejected, and the saved configuration is unchanged.
    config = (tmp_path / "run" / "config.gin").read_text()
    assert train(work, tmp_path / "run", *lumen, **shared, TRAIN_STEPS=2, BATCH_SIZE=16) == 2
    assert "batch_size was 8 and is now 16" in capfd.readouterr().err
    assert (tmp_path / "run" / "config.gin").read_text() == config

    # So is another learning rate schedule.
    linear = {**shared, "SCHEDULE": "linear"}
    assert train(work, tmp_path / "run", *lumen, **linear, TRAIN_STEPS=2) == 2
    assert "schedule_end was None and is now 2" in capfd.readouterr().err

    # The initial checkpoint may be gone.
    shutil.rmtree(first)
    assert train(work, tmp_path / "run", *lumen, **shared, TRAIN_STEPS=2) == 0
    assert "from step 1 to 2" in capfd.readouterr().err
    changed = "was trained with other settings so far: TRAIN_STEPS: 1 -> 2."
    assert f"MODEL_DIR: {tmp_path / 'run'} {changed}" in caplog.text
    assert "TRAIN_STEPS = 2" in (tmp_path / "run" / "config.gin").read_text()
