"""The loop: exact resumption, stopping, what is saved and what is said."""

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
from glimmer_jax.runtime.preemption import Preempted, Watcher
from glimmer_jax.training import checkpoint, log, loop
from glimmer_jax.training.checkpoint import Checkpoints
from glimmer_jax.training.log import Goodput, MetricWriter, NonFiniteError, format_seconds, means
from glimmer_jax.training.loop import TrainConfig, train
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.weights.load import load
from tests.training import toy_run
from tests.training.toy_model import ToyModel, batch_at, batches_from

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ToyModel()


def train_toy(
    model_dir, make_batches=batches_from, model=MODEL, evaluate=None, on_start=None, **config
):
    return train(
        TrainConfig(**config),
        model,
        make_optimizer(OptimizerConfig(learning_rate=0.03), model.param_names()),
        make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        model_dir,
        make_batches,
        model.init,
        on_start=on_start,
        evaluate=evaluate,
        metadata={"vocabulary_fingerprint": "sha256:0"},
    )


def log_lines(model_dir, folder="train"):
    lines = (model_dir / folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_killed_and_restarted_equals_uninterrupted(tmp_path):
    def run(name, *args):
        command = [sys.executable, "-m", "tests.training.toy_run", str(tmp_path / name), *args]
        return subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)

    killed = run("killed", "10", "8")
    assert killed.returncode == -signal.SIGKILL
    toy_run.main(tmp_path / "killed", 10)
    toy_run.main(tmp_path / "whole", 10)
    states = []
    for name in ("killed", "whole"):
        folder = tmp_path / name / "checkpoints"
        with Checkpoints(folder, keep_latest=1) as checkpoints:
            assert checkpoints.steps() == [10]
        states.append(load(folder).params)
    jax.tree.map(np.testing.assert_array_equal, *states)
    steps = [line["step"] for line in log_lines(tmp_path / "killed")]
    assert steps == sorted(set(steps))


def test_the_step_is_traced_once_and_progress_is_told(tmp_path, capfd):
    traces = itertools.count()

    class Counting(ToyModel):
        def loss_fn(self, *args):
            next(traces)
            return super().loss_fn(*args)

    state = train_toy(tmp_path, model=Counting(), total_steps=6, log_every=3)
    assert int(state.step) == 6 and next(traces) == 1
    err = capfd.readouterr().err
    assert "from random parameters" in err
    assert "step 6/6" in err and "steps/s" in err and "examples/s" in err and "left" in err
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 6]
    assert {"train/loss", "train/token_loss", "train/grad_norm", "train/learning_rate"} < set(
        lines[0]
    )
    assert lines[1]["train/loss"] < lines[0]["train/loss"]
    assert list((tmp_path / "train").glob("events.out.tfevents.*"))
    # The same command again has nothing left to do.
    assert int(train_toy(tmp_path, total_steps=6).step) == 6


def batches_with_nan(first, last):
    def make_batches(step):
        for batch in batches_from(step):
            if first <= step + 1 <= last:
                batch["decoder_loss_weights"] = batch["decoder_loss_weights"] * np.nan
            yield batch
            step += 1

    return make_batches


def test_too_many_non_finite_losses_in_a_row_end_the_run_with_the_last_good_step(tmp_path):
    make_batches = batches_with_nan(6, 99)
    with pytest.raises(NonFiniteError, match=r"Step 7: loss nan.* 2 times in a row, of which 1"):
        train_toy(tmp_path, make_batches, total_steps=20, checkpoint_every=5, max_skipped=1)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 5


def test_a_non_finite_loss_is_skipped_counted_and_changes_nothing(tmp_path, capfd):
    settings = dict(total_steps=5, log_every=1, max_skipped=2)
    state = train_toy(tmp_path / "nan", batches_with_nan(4, 5), **settings)
    good = train_toy(tmp_path / "good", **{**settings, "total_steps": 3})
    assert int(state.step) == 5
    jax.tree.map(np.testing.assert_array_equal, state.params, good.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, good.opt_state)
    assert "Step 5: loss nan" in (err := capfd.readouterr().err) and "2 in a row, 2 in all" in err
    lines = log_lines(tmp_path / "nan")
    assert [line["train/skipped_steps"] for line in lines] == [0, 0, 0, 1, 2]
    assert "train/loss" not in lines[4] and 0 <= lines[4]["train/goodput"] <= 1


def test_goodput_is_what_is_left_of_a_life():
    clock = iter([100.0, 110.0, 110.0, 115.0, 150.0])
    goodput = Goodput(lambda: next(clock) - 1e9)
    goodput.started()
    with goodput.lost():
        pass
    assert goodput.report() == pytest.approx({"goodput": 35 / 50, "alive_seconds": 50})


def test_goodput_and_skipped_steps_are_those_of_all_lives(tmp_path):
    def line(step, alive, goodput, skipped):
        train = {"goodput": goodput, "alive_seconds": alive, "skipped_steps": skipped}
        return {"step": step, **{f"train/{name}": value for name, value in train.items()}}

    # Saved at step 5; killed after step 8, whose line is cut in two.
    lines = [line(2, 30, 0.5, 1), line(4, 40, 0.6, 2), {"step": 4, "dev/em": 0.5}]
    lines += [line(6, 50, 0.7, 2), line(7, 60, 0.75, 3)]
    text = "".join(json.dumps(one) + "\n" for one in lines) + '{"step": 8, "train/alive_sec'
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = MetricWriter(tmp_path, start_step=5)
    writer.close()
    assert [one["step"] for one in log_lines(tmp_path.parent, tmp_path.name)] == [2, 4, 4]
    assert writer.earlier == log.Earlier(alive=60, useful=24, skipped=2)
    clock = iter([100.0, 110.0, 140.0])
    goodput = Goodput(lambda: next(clock) - 1e9, writer.earlier)
    goodput.started()
    assert goodput.report() == pytest.approx({"goodput": (24 + 30) / 100, "alive_seconds": 100})
    assert log.Skips(1, 2).total == 2
    assert log.Earlier.of(lines, 1) == log.Earlier(60)
    assert log.Earlier.of([{"step": 3, "train/goodput": 0.5}], 3) == log.Earlier()


def test_a_run_that_goes_on_counts_on(tmp_path):
    for steps in (4, 8):
        train_toy(tmp_path, batches_with_nan(3, 3), total_steps=steps, log_every=2)
    lines = log_lines(tmp_path)
    assert [one["train/skipped_steps"] for one in lines] == [0, 1, 1, 1]
    alive = [one["train/alive_seconds"] for one in lines]
    assert alive == sorted(alive) and all(0 <= one["train/goodput"] <= 1 for one in lines)
    # The process that goes on here is the same one, as old again.
    assert alive[2] > 2 * alive[0]


def test_sigterm_saves_and_is_reported(tmp_path):
    def make_batches(step):
        for batch in batches_from(step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
            step += 1

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=r"Stopped at step \d of 50, saved"):
        train_toy(tmp_path, make_batches, total_steps=50)
    assert signal.getsignal(signal.SIGTERM) is handler
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert 2 <= checkpoints.latest_step() <= 5


@pytest.mark.parametrize("slow", ["tensorstore.open", f"{checkpoint.__name__}.write_sidecar"])
def test_steps_go_on_while_a_checkpoint_is_written_however_slowly(
    tmp_path, monkeypatch, capfd, slow
):
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
            # Two batches lie ready: all steps before the eighth have been started.
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
    assert "Step 6: the checkpoint before this one is still being written" in capfd.readouterr().err
    with Checkpoints(tmp_path / "run" / "checkpoints", keep_latest=9) as checkpoints:
        assert checkpoints.steps() == saved
    # What was saved is the third step, though later ones ran before it was written.
    params = load(tmp_path / "run" / "checkpoints" / "3").params
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(wanted.params))


def test_the_best_on_dev_is_kept(tmp_path, capfd):
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


def test_sigterm_during_an_evaluation_cuts_it_short_and_saves(tmp_path, capfd):
    polls = itertools.count()

    def evaluate(state, poll):
        for _ in range(100):
            next(polls)
            os.kill(os.getpid(), signal.SIGTERM)
            poll()
        return {}

    with pytest.raises(Preempted, match="Stopped at step 2 of 50, saved"):
        train_toy(tmp_path, evaluate=evaluate, total_steps=50, eval_every=2)
    assert next(polls) == 1 and "dev" not in capfd.readouterr().err
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 2


def test_a_last_evaluation_that_was_cut_short_is_made_up_for(tmp_path):
    calls = itertools.count()

    def evaluate(state, poll):
        if next(calls) < 2:
            os.kill(os.getpid(), signal.SIGTERM)
            poll()
        return {"exact_match": 0.5}

    settings = dict(total_steps=3, eval_every=5, best_metric="exact_match")
    with pytest.raises(Preempted, match="Stopped at step 3 of 3, saved"):
        train_toy(tmp_path, evaluate=evaluate, **settings)
    with pytest.raises(Preempted, match="Stopped evaluating step 3, which is saved"):
        train_toy(tmp_path, evaluate=evaluate, **settings)
    for _ in range(2):
        train_toy(tmp_path, evaluate=evaluate, **settings)
        with Checkpoints(tmp_path / "checkpoints", best_metric="exact_match") as checkpoints:
            assert checkpoints.best_step() == 3
            assert checkpoints.metadata(3)["dev_metrics"] == {"exact_match": 0.5}
    assert next(calls) == 3
    dev = [line for line in log_lines(tmp_path) if "dev/exact_match" in line]
    assert [line["step"] for line in dev] == [3]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    def make_batches(step):
        with pytest.raises(ValueError, match=f"being written by process {os.getpid()} on"):
            train_toy(tmp_path, total_steps=9)
        return batches_from(step)

    train_toy(tmp_path, make_batches, total_steps=2)
    assert not (tmp_path / loop.LOCK).exists()


def test_the_caller_sees_the_first_state_unless_there_is_nothing_to_do(tmp_path):
    seen = []
    for total, wanted in ((2, [0]), (4, [0, 2]), (4, [0, 2])):
        train_toy(tmp_path, total_steps=total, on_start=lambda state: seen.append(int(state.step)))
        assert seen == wanted


def test_data_that_ends_early_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ended after step 2 of 5"):
        train_toy(tmp_path, lambda step: iter([batch_at(0), batch_at(1)]), total_steps=5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"eval_every": -1}, "eval_every must be 0"),
        ({"max_skipped": -1}, "max_skipped must be 0"),
        ({"best_metric": "em"}, "needs evaluations"),
    ],
)
def test_wrong_lengths_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"total_steps": 5, **change})


def test_a_restarted_log_forgets_later_steps_and_half_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 2, "a": 1}\n{"step": 4, "a": 1}\n{"step": 5, "'
    )
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


def test_in_a_bucket_the_log_is_written_anew_and_tensorboards_files_are_copied(
    tmp_path, monkeypatch
):
    # Another scheme than a file's; what stands behind it is a folder here.
    bucket = lambda path: tmp_path / path.removeprefix("gs://")  # noqa: E731
    monkeypatch.setattr(log.epath, "Path", bucket)
    for start, loss in ((0, 0.5), (3, 0.4)):
        writer = MetricWriter("gs://b/train", start_step=start)
        writer.write(start + 1, {"loss": loss}, "train")
        writer.close()
    lines = (tmp_path / "b" / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
    events = sorted((tmp_path / "b" / "train").glob("events.out.tfevents.*"))
    found = [
        (event.step, value.tag, round(value.simple_value, 3))
        for path in events
        for event in read_events(path)
        for value in event.summary.value
    ]
    assert found == [(1, "train/loss", 0.5), (4, "train/loss", 0.4)]
    assert len(list((tmp_path / "b" / "train").iterdir())) == 1 + len(events)


def test_means_leave_out_what_has_no_weight():
    assert means({"a": (6.0, 3.0), "b": (0.0, 0.0)}) == {"a": 2.0}
    assert [format_seconds(s) for s in (7, 67, 7384.2, float("inf"))] == [
        "7s",
        "1m07s",
        "2h03m",
        "?",
    ]


def test_a_watcher_can_be_asked_without_a_signal():
    with Watcher() as watcher:
        assert not watcher.requested
        watcher.request()
        assert watcher.requested
    assert loop.Watcher is Watcher
