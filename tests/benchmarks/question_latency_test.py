"""The complete script at a tiny size: processes, a real store, timing, JSON and tables."""

import contextlib
import json
import re

import numpy as np
import pytest

from benchmarks import peaks, question_latency, table, timing
from benchmarks.jax_systems import JaxSystem
from benchmarks.setting import JAX_SYSTEMS, Setting, glimmer_config
from benchmarks.torch_fid import TorchFid
from glimmer_jax.models.cost import question_cost

TINY = Setting("tiny", question=4, passage=12, answer=3, passages=(3, 6), kept=2, threads=2)
ARGUMENTS = ["--size", "tiny", "--question", "4", "--passage", "12", "--answer", "3", "--kept", "2"]


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "SIDE", {True: 16})
    monkeypatch.setattr(peaks, "BYTES", 1 << 10)


def test_the_script_writes_a_row_for_each_size_and_prints_them(tmp_path, capfd):
    path = tmp_path / "latency.json"
    options = ["--systems", "glimmer", "--dtypes", "float32", "--passages", "3", "6", "--runs", "1"]
    question_latency.main(["--json", str(path), *options, *ARGUMENTS])
    rows = json.loads(path.read_text())
    assert [(row["system"], row["dtype"], row["passages"]) for row in rows] == [
        ("glimmer", "float32", 3),
        ("glimmer", "float32", 6),
    ]
    for row in rows:
        assert row["median_seconds"] > 0 and row["cpu_seconds"] > 0
        # A process with JAX in it, and less than the machine has.
        assert 1e8 < row["peak_bytes"] < 1e11
        assert row["bound_seconds"] > 0
    assert rows[1]["flops"] > rows[0]["flops"]
    assert "| glimmer | float32 |" in capfd.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_glimmer_answers_in_full_length_from_a_store(dtype):
    with contextlib.closing(JaxSystem("glimmer_fido", dtype, TINY)) as ours:
        ours.prepare(6)
        assert ours.answer(6).shape == (3,)
        assert ours.peaks()["peak_flops_per_second"] > 0


def test_counted_flops_are_those_of_the_formula_and_what_it_leaves_out():
    counted = {}
    for system in JAX_SYSTEMS:
        with contextlib.closing(JaxSystem(system, "float32", TINY)) as ours:
            counted[system] = ours.flops(6)
    for system in ("fid", "lumen"):
        config = glimmer_config(system, TINY, "float32", on_cpu=True)
        cost = question_cost(config, passages=6, question=4, passage=12, answer=3)
        # Attention's products and the vocabulary's are left out: a third at this size.
        assert 2 * cost.total < counted[system] < 3 * cost.total
    # By and by less is read.
    assert sorted(JAX_SYSTEMS, key=counted.__getitem__, reverse=True) == list(JAX_SYSTEMS)


# Compiling takes PyTorch tens of seconds.
@pytest.mark.parity
@pytest.mark.parametrize(
    "encoders", [("plain",), pytest.param(("plain", "compiled"), marks=pytest.mark.slow)]
)
def test_all_variants_of_pytorch_answer_alike_and_the_fastest_is_taken(encoders, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    variants = tuple(variant for variant in TorchFid.VARIANTS if variant[2] in encoders)
    monkeypatch.setattr(TorchFid, "VARIANTS", variants)
    theirs = TorchFid("pytorch_fid", "float32", TINY)
    answers = []
    for variant in variants:
        theirs._random = np.random.default_rng(3)
        answers.append(theirs.run(3, *variant).tolist())
    assert len(answers[0]) == 3
    assert all(one == answers[0] for one in answers)
    theirs.prepare(3)
    assert theirs.answer(3).shape == (3,)
    times = theirs.details["variants"]
    assert len(times) == len(answers)
    assert times[theirs.details["variant"]] == min(times.values())
    assert theirs.flops(3) > 0


@pytest.mark.parity
def test_int8_encodes_almost_as_float32():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    states, flops = {}, set()
    for dtype in ("float32", "int8"):
        theirs = TorchFid("pytorch_fid", dtype, TINY)
        theirs._random = np.random.default_rng(3)
        encoded, _ = theirs._encode(theirs._model.encoder, theirs.batch(3))
        states[dtype] = encoded.detach().numpy()
        flops.add(theirs.flops(3))
    error = np.abs(states["int8"] - states["float32"]).mean() / np.abs(states["float32"]).mean()
    assert 0 < error < 0.1
    assert len(flops) == 1
    assert theirs.run(3, "eager", "loop_dynamic_cache", "plain").shape == (3,)


class Scripted:
    """A worker with predefined runs."""

    system, dtype = "fid", "float32"

    def __init__(self, shares, device="cpu"):
        self.shares = iter(shares)
        self.device = device
        self.runs = 0

    def request(self, action, passages):
        if action == "prepare":
            ready = {"flops": 10, "bound_seconds": 0.5, "peak_flops_per_second": 100.0}
            return {**ready, "device": self.device}
        self.runs += 1
        share = next(self.shares)
        return {"seconds": 1 / share, "cpu_seconds": 1, "cpu_share": share, "peak_bytes": self.runs}


def test_disturbed_runs_are_discarded_and_repeated():
    worker = Scripted([0.5, 1.0, 0.8, 1.0])
    (row,) = timing.measure([worker], 3, 2, lambda line: None)
    assert worker.runs == 4
    assert row["median_seconds"] == 1 and row["peak_bytes"] == 4
    assert (row["undisturbed_runs"], row["discarded_runs"]) == (2, 2)


def test_a_busy_machine_reports_its_least_disturbed_runs():
    worker = Scripted([0.5, 0.8, 0.25, 0.5])
    (row,) = timing.measure([worker], 3, 1, lambda line: None)
    assert row["median_seconds"] == 1 / 0.8 and row["undisturbed_runs"] == 0
    assert "disturbed" in table.render([row])


def test_different_kinds_of_device_are_not_compared():
    workers = [Scripted([1.0]), Scripted([1.0], "NVIDIA")]
    with pytest.raises(RuntimeError, match="device.*NVIDIA.*cpu"):
        timing.measure(workers, 3, 1, lambda line: None)
    assert [worker.runs for worker in workers] == [0, 0]


def test_tables_compare_with_pytorch_at_the_same_number_of_passages():
    base = {"flops": 10, "bound_seconds": 0.5, "peak_flops_per_second": 100.0, "peak_bytes": 10**9}
    base |= {"undisturbed_runs": 3, "discarded_runs": 0, "passages": 40}
    rows = [
        {**base, "system": "pytorch_fid", "dtype": "float32", "median_seconds": 8.0},
        {**base, "system": "pytorch_fid", "dtype": "bfloat16", "median_seconds": 4.0},
        {**base, "system": "glimmer", "dtype": "float32", "median_seconds": 1.0},
    ]
    line = next(one for one in table.render(rows).splitlines() if "glimmer" in one)
    cells = re.split(r" *\| *", line.strip("| "))
    assert cells[2:4] == ["1.000", "0"]
    assert cells[5:9] == ["8.00", "4.00", "0.10", "0.50"]


def test_more_passages_kept_than_read_are_rejected():
    with pytest.raises(ValueError, match="--kept.* 3"):
        Setting(passages=(3,), kept=5)


def test_an_unknown_size_is_rejected():
    with pytest.raises(ValueError, match="size.*base, tiny.*huge"):
        Setting(size="huge")


def test_no_passages_are_rejected():
    with pytest.raises(ValueError, match="at least 1"):
        Setting(passages=())


def test_a_process_that_dies_is_reported():
    broken = Setting("tiny", question=1, passage=1, answer=1, passages=(5,), kept=5, threads=1)
    with pytest.raises(RuntimeError, match="nonsense.*float32.*1"):
        timing.Worker("nonsense", "float32", broken)
