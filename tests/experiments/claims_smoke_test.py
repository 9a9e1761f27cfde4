"""The experiments' smoke test: every block with tiny runs, then a second run that finds them done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.claim_arms import BLOCKS, SMOKE
from glimmer_jax.shipped import CHECKPOINTS

pytest.importorskip("seqio")
ROOT = Path(__file__).parents[2]
START = CHECKPOINTS / "pydocs_start.safetensors"
MAKE_START = """
from experiments.command import glimmer
glimmer("train", "examples/pydocs_start_train", MODEL_DIR="start", TRAIN_STEPS=2)
glimmer("export", "runs/export", CHECKPOINT_PATH="start", OUTPUT_PATH="pydocs_start.safetensors")
"""


def python(folder, *args):
    """Runs Python in a folder, without the XLA flags of the tests."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    subprocess.run([sys.executable, *args], cwd=folder, env=env, check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smoke_runs_all_blocks_and_resumes(tmp_path):
    start = START
    if not start.is_file():
        start = tmp_path / START.name
        python(tmp_path, "-c", MAKE_START)
    command = ("-m", "experiments.claims", "--smoke", "--output=out", f"--start={start}")
    python(tmp_path, *command)
    lines = (tmp_path / "out" / "claims.jsonl").read_text().splitlines()
    units = [record for record in map(json.loads, lines) if "block" in record]
    expected = {
        (block, arm) for block, about in BLOCKS.items() for arm in about.arms if arm in SMOKE.arms
    }
    assert {(unit["block"], unit["arm"]) for unit in units} == expected
    for unit in units:
        for result in unit["results"].values():
            assert all(0 <= value <= 1 for value in result.get("exact_match", {}).values())
    page = (tmp_path / "out" / "results.md").read_text()
    assert all(f"Block {block}" in page for block in BLOCKS if not BLOCKS[block].speed)
    # One seed has no interval.
    assert "not enough seeds" in page and "**holds**" not in page
    python(tmp_path, *command)
    assert (tmp_path / "out" / "claims.jsonl").read_text().splitlines() == lines
