"""The complete script at a tiny size, and the steps that it compares."""

import contextlib
import json

import jax
import numpy as np
import pytest

from benchmarks import peaks, torch_fid, train_step
from benchmarks.jax_training import JaxTraining
from benchmarks.setting import Setting

TINY = Setting(
    "tiny", question=4, passage=12, answer=3, passages=(6,), kept=2, threads=2, training=True
)
ARGUMENTS = ["--size", "tiny", "--question", "4", "--passage", "12", "--answer", "3", "--kept", "2"]


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "SIDE", {True: 16})
    monkeypatch.setattr(peaks, "BYTES", 1 << 10)


def test_the_script_writes_a_row_and_prints_it(tmp_path, capfd):
    path = tmp_path / "train_step.json"
    options = ["--systems", "glimmer", "--dtypes", "bfloat16", "--passages", "3", "--runs", "1"]
    train_step.main(["--json", str(path), *options, *ARGUMENTS])
    (row,) = json.loads(path.read_text())
    assert (row["system"], row["dtype"], row["passages"]) == ("glimmer", "bfloat16", 3)
    assert row["median_seconds"] > 0 and row["flops"] > 0 and row["bound_seconds"] > 0
    assert 1e8 < row["peak_bytes"] < 1e11
    assert "| glimmer | bfloat16 |" in capfd.readouterr().out


@pytest.mark.parametrize("system", ["fid", "lumen", "glimmer_memory"])
def test_a_step_updates_what_is_not_frozen(system):
    with contextlib.closing(JaxTraining(system, "float32", TINY)) as ours:
        before = jax.tree.map(np.array, ours._state.params)
        assert np.isfinite(ours.answer(6))
        changed = jax.tree.map(lambda old, new: (old != new).any(), before, ours._state.params)
        assert all(jax.tree.leaves(changed)) == (system == "fid")
        assert all(jax.tree.leaves(changed["decoder"]))
        assert ours.flops(6) > 0
        assert ("passage_memory" in ours.batch(6)) == (system == "glimmer_memory")


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_trains_with_both_attentions_and_the_fastest_is_taken(dtype):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = torch_fid.TorchTraining("pytorch_fid", dtype, TINY)
    theirs.prepare(6)
    times = theirs.details["variants"]
    assert set(times) == set(torch_fid.ATTENTION)
    assert times[theirs.details["variant"]] == min(times.values())
    assert theirs.answer(6) > 0 and theirs.flops(6) > 0
