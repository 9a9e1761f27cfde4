"""All memory commands on the command line, with a tiny checkpoint and the built-in vocabulary."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import gin
import jax
import numpy as np
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import codebooks
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

SIZES = {
    "NUM_ENCODER_LAYERS": 2,
    "t5.T5Config.num_decoder_layers": 1,
    "t5.T5Config.emb_dim": 16,
    "t5.T5Config.num_heads": 4,
    "t5.T5Config.head_dim": 4,
    "t5.T5Config.mlp_dim": 32,
    "ALPHA": 0.5,
    "MAX_PASSAGE_TOKENS": 16,
    "BATCH_SIZE": 2,
    "SHARD_PASSAGES": 8,
}
GLIMMER = ("sizes/tiny", "models/glimmer")


@pytest.fixture(autouse=True)
def clear():
    yield
    gin.clear_config()


def _write(path, ids):
    vocabulary = Vocabulary("pydocs")
    records = [
        {"id": i, "title": f"json.dumps {i}", "text": "formatted stream " * (i % 4)} for i in ids
    ]
    write_passages(
        path,
        records,
        vocabulary.encode,
        vocabulary.fingerprint,
        16,
        vocab_size=vocabulary.vocab_size,
    )
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(checkpoint, passages 0..39, passages 0..49)."""
    folder = tmp_path_factory.mktemp("files")
    t5 = dataclasses.replace(
        tiny.T5,
        vocab_size=2048,
        num_encoder_layers=2,
        num_decoder_layers=1,
        mlp_activations=("relu", "linear"),
        scan_layers=False,
    )
    config = GlimmerConfig(t5, memory_layers=1, rerank_layers=1, num_kept=1)
    shapes, _ = GlimmerModel(config).abstract_variables()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype("f"), shapes)
    checkpoint = str(folder / "tiny.safetensors")
    save_params_file(checkpoint, params, describe(config, Vocabulary("pydocs").fingerprint))
    return checkpoint, _write(folder / "some", range(40)), _write(folder / "all", range(50))


def _arguments(mode, *gin_files, **macros):
    names = [f"--gin_file=gin/{file}.gin" for file in gin_files]
    return [f"--run_mode={mode}", *names, *(f"--gin.{k}={v!r}" for k, v in macros.items())]


def run(mode, *gin_files, **macros):
    return command_line.main(_arguments(mode, *gin_files, **macros))


def build(checkpoint, passages, memory, **macros):
    given = dict(CHECKPOINT_PATH=checkpoint, PASSAGES_DIR=passages, MEMORY_DIR=str(memory))
    macros = {**given, **SIZES, **macros}
    return _arguments("build_memory", *GLIMMER, "runs/build_memory", **macros)


@pytest.mark.fault
def test_damaged_passages_are_never_encoded(files, tmp_path, capsys):
    checkpoint, some, _ = files
    folder = shutil.copytree(some, tmp_path / "p")
    tokens = bytearray((folder / "tokens.npy").read_bytes())
    tokens[-3] ^= 1
    (folder / "tokens.npy").write_bytes(tokens)
    memory = tmp_path / "m"
    assert command_line.main(build(checkpoint, str(folder), memory)) == 2
    assert "tokens.npy is damaged" in capsys.readouterr().err
    assert not memory.exists()
    assert command_line.main(build(checkpoint, some, memory)) == 0
    job = dict(
        CHECKPOINT_PATH=checkpoint, PASSAGES_DIR=str(folder), MEMORY_DIR=str(memory), **SIZES
    )
    for action in ("append", "repair"):
        assert run("memory", "runs/memory", *GLIMMER, ACTION=action, **job) == 2
        assert "tokens.npy is damaged" in capsys.readouterr().err


def test_the_error_of_codebooks_is_measured_on_a_bounded_sample(
    files, tmp_path, monkeypatch, capsys
):
    checkpoint, _, every = files
    monkeypatch.setattr(codebooks, "_TEST_TOKENS", 20)
    job = {k: v for k, v in SIZES.items() if k != "SHARD_PASSAGES"}
    job |= dict(CHECKPOINT_PATH=checkpoint, PASSAGES_DIR=every, ITERATIONS=1, SAMPLE_TOKENS=300)
    job |= dict(MEMORY_CODEC="pq", OUTPUT_PATH=str(tmp_path / "pq.safetensors"))
    assert run("codebooks", *GLIMMER, "runs/codebooks", **job) == 0
    said = capsys.readouterr().out
    assert "300" in said and re.search(r"\b20\b", said)


@pytest.mark.parametrize("codec", ["bf16", "pq"])
def test_a_memory_is_built_appended_repaired_withdrawn_and_merged(
    files, tmp_path, folder_bytes, codec, capsys
):
    checkpoint, some, every = files
    macros = {**SIZES, "MEMORY_CODEC": codec}
    if codec == "pq":
        with_books = str(tmp_path / "pq.safetensors")
        given = {k: v for k, v in macros.items() if k != "SHARD_PASSAGES"}
        given |= dict(CHECKPOINT_PATH=checkpoint, PASSAGES_DIR=every, ITERATIONS=2)
        # Without codebooks there is nothing to build with, and the message says how to get them.
        assert command_line.main(build(checkpoint, some, tmp_path / "m", MEMORY_CODEC="pq")) == 2
        assert "--run_mode=codebooks" in capsys.readouterr().err
        assert run("codebooks", *GLIMMER, "runs/codebooks", OUTPUT_PATH=with_books, **given) == 0
        assert "codebooks of pq" in capsys.readouterr().out
        checkpoint = with_books
    memory = tmp_path / "m"
    assert command_line.main(build(checkpoint, some, memory, MEMORY_CODEC=codec)) == 0
    job = dict(CHECKPOINT_PATH=checkpoint, PASSAGES_DIR=every, MEMORY_DIR=str(memory), **macros)
    model = ("runs/memory", *GLIMMER)
    capsys.readouterr()
    other = {"MEMORY_CODEC": codec, "BATCH_SIZE": 2 * SIZES["BATCH_SIZE"]}
    assert command_line.main(build(checkpoint, some, memory, **other)) == 2
    assert "ACCEPT_OTHER_PROGRAM = True" in capsys.readouterr().err
    other["ACCEPT_OTHER_PROGRAM"] = True
    assert command_line.main(build(checkpoint, some, memory, **other)) == 0

    capsys.readouterr()
    assert run("memory", *model, ACTION="append", **job) == 0
    # Before it, what was read.
    said = capsys.readouterr().out
    added = json.loads(said[said.index("{") :])
    assert (added["passages"], added["version"], added["codec"]) == (50, 2, codec)
    before = folder_bytes(memory)
    array = "codes" if codec == "pq" else "states"
    (memory / "shards" / "000003" / array / "c" / "0" / "0").write_bytes(b"lost")
    assert run("memory", "runs/memory", ACTION="verify", MEMORY_DIR=str(memory)) == 2
    assert run("memory", *model, ACTION="repair", **job) == 0
    assert folder_bytes(memory) == before

    wrong = {"MEMORY_DIR": str(memory), "IDS": [3, "nope"]}
    assert run("memory", "runs/memory", ACTION="withdraw", **wrong) == 2
    assert f"IDS: 1 of 2 passages are not in the memory {memory}: 'nope'" in capsys.readouterr().err
    assert run("memory", "runs/memory", ACTION="inspect", MEMORY_DIR=some) == 2
    assert "MEMORY_DIR: " in (shown := capsys.readouterr().err) and "passages folder" in shown
    assert run("memory", "runs/memory", ACTION="withdraw", MEMORY_DIR=str(memory), IDS=[3, 44]) == 0
    _write(tmp_path / "more", [3, 100, 101])
    more = tmp_path / "m2"
    made = build(checkpoint, str(tmp_path / "more"), more, MEMORY_CODEC=codec)
    assert command_line.main(made) == 0
    whole = tmp_path / "whole"
    capsys.readouterr()
    for action, wrong, message in (
        (
            "withdraw",
            {"IDS": 3},
            'IDS must be list of int | str, got 3. Set for example --gin.IDS="[0, 1]"',
        ),
        ("withdraw", {"IDS": []}, "This mode requires IDS"),
        ("withdraw", {"IDS": [-1]}, "IDS: `id` must be from 0 to 2**63 - 1, got -1"),
        ("withdraw", {"IDS": [0, 2**63]}, "got 9223372036854775808"),
        (
            "merge",
            {"PARTS": str(more)},
            "PARTS must be list of str, got ",
        ),
    ):
        assert run("memory", "runs/memory", ACTION=action, MEMORY_DIR=str(whole), **wrong) == 2
        assert message in capsys.readouterr().err
    parts = [str(memory), str(more)]
    assert run("memory", "runs/memory", ACTION="merge", MEMORY_DIR=str(whole), PARTS=parts) == 0
    store = MemoryStore.open(whole)
    assert verify(store.path) == []
    assert store.rows([3, 44, 100], "mask").tolist() == [50, -1, 51]


@pytest.mark.fault
def test_builders_in_separate_processes_write_the_bytes_of_one(files, tmp_path, folder_bytes):
    checkpoint, some, _ = files
    # One device: what a program computes may depend on their number, and here it should not differ.
    root = str(pathlib.Path(__file__).parents[2])
    flags = "--xla_backend_optimization_level=0"
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def start(memory, **macros):
        command = [
            sys.executable,
            "-m",
            "glimmer_jax.main",
            *build(checkpoint, some, memory, **macros),
        ]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    running = [start(tmp_path / "many", BUILDER_INDEX=i, BUILDER_COUNT=2) for i in (1, 0)]
    running.append(start(tmp_path / "one"))
    for process in running:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    left = {k: v for k, v in folder_bytes(tmp_path / "many").items() if "lock" not in k}
    assert left == folder_bytes(tmp_path / "one")
