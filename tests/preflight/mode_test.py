"""`--run_mode=preflight` from the command line, and what TPU programs hold."""

import importlib.util
import json
import os
import sys

import gin
import pytest

from glimmer_jax import main as command_line

TINY = [f"--gin_file=gin/{name}.gin" for name in ("models/glimmer", "sizes/tiny")]
SETTINGS = [
    "--gin.NUM_KEPT=2",
    "--gin.DISTILLATION_WEIGHT=0.0",
    "--gin.NUM_ENCODER_LAYERS=3",
    "--gin.t5.T5Config.num_decoder_layers=1",
    "--gin.t5.T5Config.emb_dim=64",
    "--gin.t5.T5Config.num_heads=2",
    "--gin.t5.T5Config.head_dim=32",
    "--gin.t5.T5Config.mlp_dim=128",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4, 'passages': (4, 16)}",
]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(autouse=True)
def clear():
    yield
    gin.clear_config()


def preflight(tmp_path, *flags):
    path = tmp_path / "report.json"
    code = command_line.main(["--run_mode=preflight", f"--json={path}", *TINY, *SETTINGS, *flags])
    return code, json.loads(path.read_text()) if path.exists() else None


@needs_compiler
def test_a_training_step_compiles_without_the_target_slice(tmp_path, capfd):
    run = ("--gin_file=gin/runs/finetune.gin", "--gin.BATCH_SIZE=8")
    code, report = preflight(tmp_path, "--topology=v5e:2x2", *run)
    assert code == 0 and report["fits"] is True
    assert (report["chips"], report["hosts"], report["mesh"]["fsdp"]) == (4, 1, 4)
    assert report["mesh_flags"] == {"MESH_DATA": 1, "MESH_FSDP": 4}
    kinds = report["bytes_per_chip"]
    assert {"parameters", "optimiser", "activations", "memory_table", "total"} <= set(kinds)
    assert kinds["total"] < report["hbm_bytes_per_chip"] == 16 * 2**30
    assert report["flops_per_step"] >= report["model_flops_per_step"] > 0
    # FSDP: parameters are gathered, gradients summed.
    assert report["collectives"]["all-gather"]["bytes"] > 0
    assert report["memory_seconds"] > 0 and report["kernels"] == 0
    parts = report["estimated_parts"]
    assert {"memory_encoder/attention", "decoder/mlp/wo", "collectives"} <= set(parts)
    assert report["estimated_step_seconds"] == pytest.approx(sum(parts.values()))
    said = capfd.readouterr()
    assert "train on v5e:2x2: fits." in said.out
    assert "run it with: --gin.MESH_DATA=1 --gin.MESH_FSDP=4\n" in said.out
    # libtpu's warning about a machine without a TPU is irrelevant.
    assert "TPU" not in said.err


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "slices", "chips", "devices"),
    [("v5e:2x2", 2, 8, 8), ("v4:2x2x1", 1, 4, 4), ("tpu7x:2x2x1", 1, 4, 8)],
)
def test_other_slices_have_a_compiler_too(tmp_path, capfd, topology, slices, chips, devices):
    run = ("--gin_file=gin/runs/finetune.gin", "--gin.BATCH_SIZE=8")
    code, report = preflight(tmp_path, f"--topology={topology}", *run, f"--gin.MESH_SLICE={slices}")
    assert code == 0 and report["fits"] is True
    assert (report["slices"], report["chips"]) == (slices, chips)
    assert report["mesh"]["fsdp"] * slices == devices
    assert report["bytes_per_chip"]["total"] < report["hbm_bytes_per_chip"]
    # Each slice has all parameters, so that gradients cross the network between them.
    assert (report["bytes_between_slices"] > 0) == (slices > 1)
    assert ("not included" in capfd.readouterr().out) == (slices > 1)


@needs_compiler
def test_answers_from_memory_count_the_table(tmp_path):
    run = ("--gin_file=gin/runs/infer.gin", "--gin.BATCH_SIZE=2", "--gin.MEMORY_DIR='m'")
    room = 1_000_000
    table = f"--gin.MEMORY_BYTES_PER_DEVICE={room}"
    code, without = preflight(tmp_path, "--topology=v6e:2x2", *run)
    assert code == 0 and without["bytes_per_chip"]["memory_table"] == 0
    code, report = preflight(tmp_path, "--topology=v6e:2x2", *run, table)
    # Four chips for two questions: the passages of each are on two.
    assert code == 0 and report["mesh"]["passages"] == report["mesh"]["data"] == 2
    # Whole pages, and two numbers of each passage.
    assert 0.99 * room < report["bytes_per_chip"]["memory_table"] <= room
    # Two questions of 4 passages of 16 tokens, 64 channels of 2 bytes, on four chips. Pages travel
    # once, with room for twice as many, and a fourth is there already; then they are laid as the
    # batch lies.
    wanted = 2 * 4 * 16 * 64 * 2 // 4
    sent = {
        kind: one["bytes"] - without["collectives"].get(kind, {"bytes": 0})["bytes"]
        for kind, one in report["collectives"].items()
    }
    assert sent["all-to-all"] == 2 * wanted * 3 // 4
    assert sum(sent.values()) - sent["all-to-all"] < 64  # of numbers


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gin_file=gin/runs/finetune.gin"], "needs --topology, such as v5p:4x4x4"),
        (["--gin_file=gin/runs/finetune.gin", "--topology=v5p:4"], "3 sides, got 1"),
        (["--gin_file=gin/runs/finetune.gin", "--gin.X=1"], "X is set, but nothing uses it"),
    ],
)
def test_invalid_requests_are_reported_in_one_line(tmp_path, flags, message, capfd):
    code, report = preflight(tmp_path, *flags)
    assert code == 2 and report is None
    assert message in capfd.readouterr().err


def test_a_report_replaces_only_a_file(tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    run = ["--gin_file=gin/runs/finetune.gin", "--topology=v5p:2x2x1"]
    flags = ["--run_mode=preflight", f"--json={tmp_path / 'pipe'}", *TINY, *SETTINGS, *run]
    assert command_line.main(flags) == 2
    assert "pipe is no regular file" in capfd.readouterr().err


def test_a_job_without_a_program_is_reported(capfd):
    score = ["--gin_file=gin/runs/score.gin", "--gin.PREDICTIONS='p'", "--gin.QUESTIONS='q'"]
    assert command_line.main(["--run_mode=preflight", "--topology=v5e:2x2", *score]) == 2
    assert "configure none of train, build_memory, eval, infer" in capfd.readouterr().err


def test_a_missing_compiler_is_reported_with_the_remedy(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    run = ["--gin_file=gin/runs/finetune.gin", "--topology=v5p:2x2x1"]
    assert preflight(tmp_path, *run)[0] == 2
    assert "pip install -c constraints.txt -e '.[preflight]'" in capfd.readouterr().err


def test_topologies_are_for_preflight_only():
    with pytest.raises(SystemExit):
        command_line.parse_flags(["--run_mode=train", "--topology=v5p:2x2x1"])
