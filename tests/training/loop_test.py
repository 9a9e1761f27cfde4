"""The training loop: bit-exact resumption, stopping, checkpoints and logs."""

import errno
import itertools
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.runtime.preemption import StopRequested
from glimmer_jax.training import checkpoint, log, loop
from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.goodput import Goodput, PreviousRuns
from glimmer_jax.training.log import (
    MetricWriter,
    NonFiniteError,
    SkippedSteps,
    means,
)
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.weights.load import load
from tests.damage import JSON_TEXTS
from tests.training import toy_run
from tests.training.toy_model import ToyModel, batch_at, batches_from, train

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ToyModel()


def train_toy(model_dir, make_batches=batches_from, model=MODEL, evaluate=None, **config):
    return train(
        TrainConfig(**config),
        model,
        make_optimizer(OptimizerConfig(learning_rate=0.03), model.param_names()),
        make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        model_dir,
        make_batches,
        model.init,
        evaluate=evaluate,
        metadata={"vocabulary_fingerprint": "sha256:0"},
    )


def log_lines(model_dir, folder="train"):
    lines = (model_dir / folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def run(name, *args):
        command = [sys.executable, "-m", "tests.training.toy_run", str(tmp_path / name), *args]
        return subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)

    killed = run("killed", "10", "8")
    assert killed.returncode == -signal.SIGKILL
    toy_run.main(tmp_path / "killed", 10)
    toy_run.main(tmp_path / "uninterrupted", 10)
    states = []
    for name in ("killed", "uninterrupted"):
        folder = tmp_path / name / "checkpoints"
        with Checkpoints(folder, keep_latest=1) as checkpoints:
            assert checkpoints.steps() == [10]
        states.append(load(folder).params)
    jax.tree.map(np.testing.assert_array_equal, *states)
    steps = [line["step"] for line in log_lines(tmp_path / "killed")]
    assert steps == sorted(set(steps))


def test_the_step_is_traced_once_and_progress_is_logged(tmp_path, capfd):
    traces = itertools.count()

    class Counting(ToyModel):
        def loss_fn(self, *args):
            next(traces)
            return super().loss_fn(*args)

    state = train_toy(tmp_path, model=Counting(), total_steps=6, log_every=3)
    assert int(state.step) == 6 and next(traces) == 1
    err = capfd.readouterr().err
    assert "from random parameters" in err
    assert (
        "train: 6 of 6 steps" in err and "steps/s" in err and "examples/s" in err and "left" in err
    )
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    assert {"train/loss", "train/token_loss", "train/grad_norm", "train/learning_rate"} < set(
        lines[0]
    )
    assert lines[1]["train/loss"] < lines[0]["train/loss"]
    assert list((tmp_path / "train").glob("events.out.tfevents.*"))
    # Rerunning the command has no step left to train.
    assert int(train_toy(tmp_path, total_steps=6).step) == 6


def batches_with_nan(first, last):
    def make_batches(step):
        for batch in batches_from(step):
            if first <= step + 1 <= last:
                batch["decoder_loss_weights"] = batch["decoder_loss_weights"] * np.nan
            yield batch
            step += 1

    return make_batches


def test_too_many_consecutive_skipped_steps_end_the_run(tmp_path):
    make_batches = batches_with_nan(6, 99)
    with pytest.raises(
        NonFiniteError, match=r"Step 7: loss nan.* 2 consecutive.*MAX_SKIPPED_STEPS=1"
    ):
        train_toy(tmp_path, make_batches, total_steps=20, checkpoint_every=5, max_skipped=1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 5


def test_a_skipped_step_is_counted_and_changes_nothing(tmp_path, capfd):
    settings = dict(total_steps=5, log_every=1, max_skipped=2)
    state = train_toy(tmp_path / "nan", batches_with_nan(4, 5), **settings)
    good = train_toy(tmp_path / "good", **{**settings, "total_steps": 3})
    assert int(state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, state.params, good.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, good.opt_state)
    assert (
        "Step 5: loss nan" in (err := capfd.readouterr().err) and "2 consecutive, 2 in total" in err
    )
    lines = log_lines(tmp_path / "nan")
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 0, 1, 2]
    assert "train/loss" not in lines[4] and 0 <= lines[4]["train/goodput"] <= 1


def test_goodput_excludes_startup_and_lost_time():
    clock = iter([100.0, 110.0, 110.0, 115.0, 150.0])
    goodput = Goodput(lambda: next(clock) - 1e9)
    goodput.mark_started()
    with goodput.lost_time():
        pass
    assert goodput.report() == pytest.approx({"goodput": 35 / 50, "alive_seconds": 50})


def test_goodput_and_skipped_steps_include_previous_runs(tmp_path):
    def log_line(step, alive, goodput, skipped):
        train = {"goodput": goodput, "alive_seconds": alive, "skipped_steps": skipped}
        return {"step": step, **{f"train/{name}": value for name, value in train.items()}}

    # Saved at step 5; killed while the line of step 8 was written.
    lines = [log_line(2, 30, 0.5, 1), log_line(4, 40, 0.6, 2), {"step": 4, "dev/em": 0.5}]
    lines += [log_line(6, 50, 0.7, 2), log_line(7, 60, 0.75, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "train/alive_sec'
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = MetricWriter(tmp_path, start_step=5)
    writer.close()
    assert [line["step"] for line in log_lines(tmp_path.parent, tmp_path.name)] == [2, 4, 4]
    assert writer.previous == PreviousRuns(60, useful_seconds=24, skipped_steps=2)
    clock = iter([100.0, 110.0, 140.0])
    goodput = Goodput(lambda: next(clock) - 1e9, writer.previous)
    goodput.mark_started()
    assert goodput.report() == pytest.approx({"goodput": (24 + 30) / 100, "alive_seconds": 100})
    assert SkippedSteps(1, 2).total == 2
    assert PreviousRuns.from_log(lines, 1) == PreviousRuns(60)
    assert PreviousRuns.from_log([{"step": 3, "train/goodput": 0.5}], 3) == PreviousRuns()


def test_a_resumed_run_continues_its_totals(tmp_path):
    # A file URL is the local folder.
    for steps, folder in ((4, f"file://{tmp_path}"), (8, tmp_path)):
        train_toy(folder, batches_with_nan(3, 3), total_steps=steps, log_every=2)
    lines = log_lines(tmp_path)
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 1, 1]
    alive = [line["train/alive_seconds"] for line in lines]
    assert alive == sorted(alive) and all(0 <= line["train/goodput"] <= 1 for line in lines)
    # The resuming process is the same one here, so its own time is counted twice.
    assert alive[2] > 2 * alive[0]


def test_sigterm_saves_and_raises_preempted(tmp_path):
    def make_batches(step):
        for batch in batches_from(step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            step += 1

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested, match=r"Stopped at step \d of 50, saved"):
        train_toy(tmp_path, make_batches, total_steps=50)
    assert signal.getsignal(signal.SIGTERM) is handler
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert 2 <= checkpoints.latest_step() <= 5


@pytest.mark.parametrize("slow", ["tensorstore.open", f"{checkpoint.__name__}.write_sidecar"])
def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch, capfd, slow):
    settings = dict(checkpoint_every=3, keep_latest=9)
    wanted = train_toy(tmp_path / "short", total_steps=3, **settings)
    written, saved = threading.Event(), []
    module, name = slow.rsplit(".", 1)
    write, save = getattr(sys.modules[module], name), Checkpoints.save

    def wait_and_write(*args, **kwargs):
        assert written.wait(20), "The steps waited for the checkpoint."
        return write(*args, **kwargs)

    def make_batches(step):
        for batch in batches_from(step):
            # Two batches are prefetched: all steps before the eighth were dispatched.
            if step == 10:
                written.set()
            yield batch
            step += 1

    monkeypatch.setattr(sys.modules[module], name, wait_and_write)
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, state, *a: saved.append(int(state.step)) or save(self, state, *a),
    )
    train_toy(tmp_path / "run", make_batches, total_steps=30, **settings)
    assert saved[0] == 3 and saved[1] >= 8 and saved[-1] == 30
    assert "Step 6: the previous checkpoint is still being written" in capfd.readouterr().err
    with Checkpoints(tmp_path / "run" / "checkpoints", keep_latest=9) as checkpoints:
        assert checkpoints.steps() == saved
    # The saved state is that of step 3, although later steps ran before it was written.
    params = load(tmp_path / "run" / "checkpoints" / "3").params
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(wanted.params))


def test_the_best_checkpoint_on_dev_is_kept(tmp_path, capfd):
    scores = {2: 0.3, 4: 0.8, 6: 0.5, 7: 0.4}
    train_toy(
        tmp_path,
        evaluate=lambda state, poll: {"exact_match": scores[int(state.step)]},
        total_steps=7,
        eval_every=2,
        keep_latest=1,
        best_metric="exact_match",
    )
    with Checkpoints(tmp_path / "checkpoints", best_metric="exact_match") as checkpoints:
        assert checkpoints.steps() == [4, 7] and checkpoints.best_step() == 4
    dev = {line["step"]: line["dev/exact_match"] for line in log_lines(tmp_path) if len(line) == 2}
    assert dev == scores
    assert "step 4  dev  exact_match 0.8" in capfd.readouterr().err


def test_sigterm_interrupts_an_evaluation_and_saves(tmp_path, capfd):
    polls = itertools.count()

    def evaluate(state, poll):
        for _ in range(100):
            next(polls)
            os.kill(os.getpid(), signal.SIGTERM)
            poll()
        return {}

    with pytest.raises(StopRequested, match="Stopped at step 2 of 50, saved"):
        train_toy(tmp_path, evaluate=evaluate, total_steps=50, eval_every=2)
    assert next(polls) == 1 and "dev" not in capfd.readouterr().err
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 2


def test_an_interrupted_last_evaluation_is_completed_on_rerun(tmp_path):
    calls = itertools.count()

    def evaluate(state, poll):
        if next(calls) < 2:
            os.kill(os.getpid(), signal.SIGTERM)
            poll()
        return {"exact_match": 0.5}

    settings = dict(total_steps=3, eval_every=5, best_metric="exact_match")
    with pytest.raises(StopRequested, match="Stopped at step 3 of 3, saved"):
        train_toy(tmp_path, evaluate=evaluate, **settings)
    with pytest.raises(StopRequested, match="Stopped.*evaluation.*step 3.*saved"):
        train_toy(tmp_path, evaluate=evaluate, **settings)
    for _ in range(2):
        train_toy(tmp_path, evaluate=evaluate, **settings)
        with Checkpoints(tmp_path / "checkpoints", best_metric="exact_match") as checkpoints:
            assert checkpoints.best_step() == 3
            assert checkpoints.metadata(3)["dev_metrics"] == {"exact_match": 0.5}
    assert next(calls) == 3
    dev = [line for line in log_lines(tmp_path) if "dev/exact_match" in line]
    assert [line["step"] for line in dev] == [3]


def test_a_second_run_in_the_same_folder_is_rejected(tmp_path):
    def make_batches(step):
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on"):
            train_toy(tmp_path, total_steps=9)
        return batches_from(step)

    train_toy(tmp_path, make_batches, total_steps=2)
    assert not (tmp_path / loop.LOCK).exists()


def test_data_that_ends_early_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="step 2 of 5.*TRAIN_STEPS"):
        train_toy(tmp_path, lambda step: iter([batch_at(0), batch_at(1)]), total_steps=5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_steps": 0}, "total_steps.*1.*0"),
        ({"eval_every": -1}, "eval_every.*-1"),
        ({"max_skipped": -1}, "max_skipped.*-1"),
        ({"best_metric": "em"}, "best_metric='em'.*eval_every"),
    ],
)
def test_invalid_intervals_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"total_steps": 5, **change})


def test_a_reopened_log_drops_later_steps_and_partial_lines(tmp_path):
    hostile = [text.encode("utf-8", "surrogatepass") for text in JSON_TEXTS]
    others = (b'{"step": "1"}', b'{"step": 1, "a": "x"}', b'{"step": 1, "a": 1%s}' % (b"0" * 400))
    lines = [b'{"step": 2, "a": 1}', *hostile, *others, b'{"step": 4, "a": 1}', b'{"step": 5, "']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    writer = MetricWriter(tmp_path, start_step=3)
    writer.write(4, {"loss": 0.5}, "train")
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "a": 1}, {"step": 4, "train/loss": 0.5}]


def read_events(path):
    """TensorBoard's events: records of a length, its checksum, the bytes, and theirs."""
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack_from("<Q", data)
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_a_full_disk_ends_the_log_and_keeps_its_line(tmp_path, monkeypatch):
    """TensorBoard's own writer has a thread, which the error would end without a word."""
    monkeypatch.setattr(log, "FLUSH_SECONDS", 0.0)
    before = threading.active_count()
    writer = MetricWriter(tmp_path)
    assert threading.active_count() == before
    writer.write(1, {"loss": 0.5}, "train")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(writer._tensorboard), "flush", full)
    with pytest.raises(OSError, match="No space"):
        writer.write(2, {"loss": 0.4}, "train")
    monkeypatch.undo()
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_in_a_bucket_both_log_files_are_rewritten(tmp_path, monkeypatch):
    # A local folder stands in for the bucket.
    bucket = lambda path: tmp_path / path.removeprefix("gs://")  # noqa: E731
    monkeypatch.setattr(log.epath, "Path", bucket)
    for start, loss in ((0, 0.5), (3, 0.4)):
        writer = MetricWriter("gs://b/train", start_step=start)
        writer.write(start + 1, {"loss": loss}, "train")
        writer.close()
    lines = (tmp_path / "b" / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
    events = sorted((tmp_path / "b" / "train").glob("events.out.tfevents.*"))
    starts = [
        [event.step for event in read_events(path) if event.session_log.status] for path in events
    ]
    assert starts == [[1], [4]]  # TensorBoard hides what was logged from there on.
    values = [
        (event.step, value.tag, round(value.simple_value, 3))
        for path in events
        for event in read_events(path)
        for value in event.summary.value
    ]
    assert values == [(1, "train/loss", 0.5), (4, "train/loss", 0.4)]
    assert len(list((tmp_path / "b" / "train").iterdir())) == 1 + len(events)


def test_means_leave_out_names_of_zero_weight():
    assert means({"a": (6.0, 3.0), "b": (0.0, 0.0)}) == {"a": 2.0}
