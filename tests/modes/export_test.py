"""Mode `export`: a parameter file, or a folder in the form of Hugging Face or T5X."""

import dataclasses

import numpy as np
import pytest

from glimmer_jax.axes import check_lengths
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.modes.export import export
from glimmer_jax.vocabulary import PYDOCS_MODEL, Vocabulary
from glimmer_jax.weights import huggingface, parameters
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

FINGERPRINT = Vocabulary("pydocs").fingerprint


def with_rows(config):
    return dataclasses.replace(config, t5=dataclasses.replace(config.t5, vocab_size=2048))


FID, GLIMMER = with_rows(tiny.FID), with_rows(tiny.GLIMMER)
LENGTHS = {"inputs": 4, "targets": 3, "passages": (5, 6)}


def save(path, config):
    """A checkpoint of the built-in vocabulary, with its lengths."""
    save_params_file(path, tiny.params(config), describe(config, FINGERPRINT, LENGTHS))
    return CheckpointConfig(str(path))


@pytest.mark.parametrize(
    ("output", "form", "content"),
    [
        ("again.safetensors", "huggingface", "a parameter file"),
        ("t5", "huggingface", "huggingface, a T5"),
        ("checkpoint_0", "t5x", "t5x, a T5"),
    ],
)
def test_every_form_holds_the_parameters_of_the_checkpoint(tmp_path, output, form, content, capsys):
    path = tmp_path / "fid.safetensors"
    export(save(path, FID), str(tmp_path / output), form)
    assert f"Wrote {tmp_path / output}: {content}." in capsys.readouterr().out
    loaded = load(tmp_path / output)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, FID), load(path).params)
    assert loaded.vocabulary_fingerprint == FINGERPRINT
    assert check_lengths(loaded.task_feature_lengths) == check_lengths(LENGTHS)


def test_an_unknown_format_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="OUTPUT_FORMAT.*huggingface, t5x, t5x_adapter.*'onnx'"):
        export(CheckpointConfig("in"), str(tmp_path / "out"), "onnx")


def test_the_t5x_adapter_format_keeps_the_parameter_tree(tmp_path, capsys):
    path = tmp_path / "glimmer.safetensors"
    output = tmp_path / "start" / "checkpoint_0"
    export(save(path, GLIMMER), str(output), "t5x_adapter")
    assert (
        f"Wrote {output}: t5x_adapter, the parameter tree of glimmer_jax."
        in capsys.readouterr().out
    )
    tiny.assert_trees_equal(load(output).params, load(path).params)


def test_a_hugging_face_folder_gets_vocabulary_and_fingerprint(tmp_path):
    path = tmp_path / "fid.safetensors"
    export(save(path, FID), str(tmp_path / "t5"), "huggingface")
    assert (tmp_path / "t5" / "spiece.model").read_bytes() == PYDOCS_MODEL.read_bytes()
    with pytest.raises(ValueError, match=f"VOCABULARY.*other.*t5.*{FINGERPRINT}"):
        parameters.load(tmp_path / "t5", GlimmerModel(FID), "other")


def test_a_parameter_that_is_not_finite_is_not_exported(tmp_path):
    params = tiny.params(FID)
    params["token_embedder"]["embedding"] = np.full((2048, 16), 3.4e38, np.float32)
    huggingface.save(tmp_path / "t5", params, FID, describe(FID, FINGERPRINT))
    # The largest float32 numbers become infinite in bfloat16.
    with pytest.raises(ValueError, match="token_embedder/embedding.*32768.*infinite"):
        export(CheckpointConfig(str(tmp_path / "t5")), str(tmp_path / "a.safetensors"))
    assert not list(tmp_path.glob("a.*"))


def test_an_existing_parameter_file_is_replaced_only_on_request(tmp_path):
    path, output = tmp_path / "fid.safetensors", tmp_path / "out.safetensors"
    given = save(path, FID)
    export(given, str(output))
    before = output.read_bytes()
    output.write_bytes(b"precious")
    with pytest.raises(
        ValueError, match=f"OUTPUT_PATH: {tmp_path}/out.json exists.*OVERWRITE=True"
    ):
        export(given, str(output))
    assert output.read_bytes() == b"precious"
    export(given, str(output), overwrite=True)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "name, content",
    [
        ("checkpoints/100/state", "a run"),
        ("manifest.json", "passages or a memory"),
        ("config.json", "a model of Hugging Face"),
        ("checkpoint", "a checkpoint of T5X"),
    ],
)
@pytest.mark.parametrize("form", ["huggingface", "t5x", "t5x_adapter"])
def test_a_folder_that_holds_something_else_is_rejected_first(tmp_path, form, name, content):
    file = tmp_path / "checkpoint_0" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ValueError, match=f"OUTPUT_PATH.*holds {content} already.*another folder"):
        export(CheckpointConfig(str(tmp_path / "missing")), str(tmp_path / "checkpoint_0"), form)
