"""The exported program: run where nothing but JAX is, it answers as the model does here."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from glimmer_jax import shipped
from glimmer_jax.axes import Lengths
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.modes.export import export
from glimmer_jax.serving.stablehlo import ProgramConfig, export_program
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

VOCABULARY = Vocabulary("pydocs")
T5 = dataclasses.replace(tiny.GLIMMER.t5, vocab_size=VOCABULARY.vocab_size)
CONFIG = dataclasses.replace(tiny.GLIMMER, t5=T5)
BUCKET = {"inputs": tiny.Q, "targets": tiny.T, "passages": (tiny.K, tiny.P)}
NAME = f"program-Q{tiny.Q}-T{tiny.T}-K{tiny.K}-P{tiny.P}.bin"
GLIMMER = GlimmerModel(CONFIG, decode=DecodeConfig(beams=2))
DOCS = pathlib.Path(shipped.root()) / "docs" / "serving.md"

# JAX, what it needs itself, and flatbuffers for `jax.export`: neither this project nor flax.
PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers")
ALONE = """
import sys
site, folder, inputs, outputs = sys.argv[1:]
sys.path.append(site)
"""
ANSWER = """
batches = {}
for name, x in np.load(inputs).items():
    which, key = name.split(":")
    batches.setdefault(which, {})[key] = x
found = {w: answer(batch) for w, batch in batches.items()}
np.savez(outputs, **{f"{w}:{name}": x for w, one in found.items() for name, x in one.items()})
try:
    import glimmer_jax
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder that the mode has written, parameters of its checkpoint)."""
    work = tmp_path_factory.mktemp("export")
    checkpoint = work / "glimmer.safetensors"
    save_params_file(checkpoint, tiny.params(CONFIG), describe(CONFIG, VOCABULARY.fingerprint))
    config = ProgramConfig([BUCKET])
    given = CheckpointConfig(str(checkpoint), decode=GLIMMER.decode)
    export(given, str(work / "program"), program=config)
    return work / "program", load(checkpoint).params


def with_memory(params, batch):
    """The arguments of a program, by name, for a batch of tokens."""
    tokens = batch["passage_tokens"]
    memory = jax.jit(GLIMMER.encode_memory)(params, tokens)
    return {
        "question_tokens": batch["question_tokens"],
        "passage_lengths": (tokens > 0).sum(-1).astype(np.int32),
        **{f"passage_memory/{name}": np.asarray(x) for name, x in memory.items()},
    }


def test_the_documented_program_needs_only_jax_and_equals_the_model(exported, tmp_path):
    folder, params = exported
    batches = {"five": tiny.batch(rows=5, gold=False), "two": tiny.batch(1, rows=2, gold=False)}
    inputs, outputs = tmp_path / "in.npz", tmp_path / "out.npz"
    flat = {
        f"{which}:{name}": x
        for which, batch in batches.items()
        for name, x in with_memory(params, batch).items()
    }
    np.savez(inputs, **flat)
    (reader,) = re.findall(r"```python\n(import json.*?)```", DOCS.read_text(), re.DOTALL)
    site = tmp_path / "site"
    site.mkdir()
    for name in PACKAGES:
        (site / name).symlink_to(pathlib.Path(importlib.util.find_spec(name).origin).parent)
    code = ALONE + reader.replace('"runs/program"', "folder") + ANSWER
    # -I and -S: no folder of packages but that one.
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, site, folder, inputs, outputs],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "No module named 'glimmer_jax'", run.stderr
    found = np.load(outputs)
    predict = jax.jit(GLIMMER.predict_batch_with_aux, compiler_options=tiny.QUICK)
    for which, batch in batches.items():
        answers, aux = predict(params, batch)
        np.testing.assert_array_equal(found[f"{which}:answers"], answers)
        np.testing.assert_array_equal(found[f"{which}:kept_passages"], aux["kept_passages"])
        for name in ("scores", "passage_scores"):
            np.testing.assert_allclose(found[f"{which}:{name}"], aux[name], rtol=1e-4)
    assert len(found.files) == 8


def test_the_manifest_describes_inputs_and_outputs(exported):
    folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    program = jax.export.deserialize(bytearray((folder / NAME).read_bytes()))
    assert list(program.platforms) == manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["programs"][NAME] == {
        "lengths": Lengths(tiny.Q, tiny.T, tiny.K, tiny.P)._asdict(),
        "arguments": {
            "passage_lengths": "int32[batch,3]",
            "passage_memory/states": "float32[batch,3,6,16]",
            "question_tokens": "int32[batch,4]",
        },
        "results": {
            "answers": "int32[batch,5]",
            "kept_passages": "int32[batch,2]",
            "passage_scores": "float32[batch,3]",
            "scores": "float32[batch]",
        },
    }
    assert sorted(manifest["sha256"]) == ["params.npz", NAME]
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["sha256"]}
    # One by one: of the last reranking layer only what is needed is computed.
    names = [name for name in np.load(folder / "params.npz") if "layers" in name]
    assert names and all(re.search(r"layers_\d+/", name) for name in names)
    assert manifest["decode"]["beams"] == 2
    assert manifest["vocabulary_fingerprint"] == VOCABULARY.fingerprint


def test_from_tokens_and_with_draws_the_seed_is_an_argument(tmp_path):
    model = GlimmerModel(tiny.FID, decode=DecodeConfig(temperature=2.0))
    params, batch = tiny.params(tiny.FID), tiny.batch(gold=False)
    config = ProgramConfig([BUCKET], from_memory=False, platforms=["cpu"])
    export_program(tmp_path / "p", model, params, config, "v")
    program = jax.export.deserialize(bytearray((tmp_path / "p" / NAME).read_bytes()))
    call = jax.jit(program.call, compiler_options=tiny.QUICK)
    given = {name: batch[name] for name in ("question_tokens", "passage_tokens")}
    parameters = dict(np.load(tmp_path / "p" / "params.npz"))
    one, again, other = (
        call(parameters, {**given, "seed": np.uint32(seed)})["answers"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(platforms="cpu"), r"PLATFORMS is a list such as \['cpu'\], got 'cpu'"),
        (dict(platforms=[]), r"PLATFORMS is a list such as \['cpu'\], got \[\]"),
        (dict(platforms=["cpu", "gpu"]), r"PLATFORMS may be cpu, cuda, rocm, tpu; got \['gpu'\]"),
        (dict(buckets=[]), "BUCKETS is a list of TASK_FEATURE_LENGTHS"),
        (dict(buckets=BUCKET), "BUCKETS is a list of TASK_FEATURE_LENGTHS"),
    ],
)
def test_settings_that_cannot_be_exported_are_rejected(settings, match):
    with pytest.raises(ValueError, match=match):
        ProgramConfig(**{"buckets": [BUCKET], **settings})


def test_existing_folders_and_fid_from_memory_are_rejected(tmp_path):
    params = tiny.params(tiny.FID)
    with pytest.raises(ValueError, match="OUTPUT_PATH.*exists"):
        export_program(tmp_path, GlimmerModel(tiny.FID), params, ProgramConfig([BUCKET]), "v")
    with pytest.raises(ValueError, match="FROM_MEMORY: FiD has no memory"):
        export_program(tmp_path / "p", GlimmerModel(tiny.FID), params, ProgramConfig([BUCKET]), "v")
