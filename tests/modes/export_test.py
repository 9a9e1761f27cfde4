"""Mode `export`: a parameter file, or a folder in the form of Hugging Face or T5X."""

import types

import numpy as np
import pytest

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.modes.export import export
from glimmer_jax.vocabulary import PYDOCS_MODEL
from glimmer_jax.weights import huggingface, parameters
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

VOCABULARY = types.SimpleNamespace(fingerprint="v", path=PYDOCS_MODEL)


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
    save_params_file(path, tiny.params(tiny.FID), describe(tiny.FID, "v"))
    export(GlimmerModel(tiny.FID), str(path), str(tmp_path / output), form, VOCABULARY)
    assert f"Wrote {tmp_path / output}: {content}." in capsys.readouterr().out
    loaded = load(tmp_path / output)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), load(path).params)


def test_an_unknown_format_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="OUTPUT_FORMAT.*huggingface, t5x, t5x_adapter.*'onnx'"):
        export(GlimmerModel(tiny.FID), "in", str(tmp_path / "out"), "onnx", VOCABULARY)


def test_the_t5x_adapter_format_keeps_the_parameter_tree(tmp_path, capsys):
    path = tmp_path / "glimmer.safetensors"
    save_params_file(path, tiny.params(tiny.GLIMMER), describe(tiny.GLIMMER, "v"))
    output = tmp_path / "start" / "checkpoint_0"
    export(GlimmerModel(tiny.GLIMMER), str(path), str(output), "t5x_adapter", VOCABULARY)
    assert (
        f"Wrote {output}: t5x_adapter, the parameter tree of glimmer_jax."
        in capsys.readouterr().out
    )
    tiny.assert_trees_equal(load(output).params, load(path).params)


def test_a_hugging_face_folder_gets_vocabulary_and_fingerprint(tmp_path):
    path = tmp_path / "fid.safetensors"
    save_params_file(path, tiny.params(tiny.FID), describe(tiny.FID, "v"))
    export(GlimmerModel(tiny.FID), str(path), str(tmp_path / "t5"), "huggingface", VOCABULARY)
    assert (tmp_path / "t5" / "spiece.model").read_bytes() == PYDOCS_MODEL.read_bytes()
    with pytest.raises(ValueError, match="VOCABULARY.*other.*t5.*v"):
        parameters.load(tmp_path / "t5", GlimmerModel(tiny.FID), "other")


def test_a_parameter_that_is_not_finite_is_not_exported(tmp_path):
    params = tiny.params(tiny.FID)
    params["token_embedder"]["embedding"] = np.full((32, 16), 3.4e38, np.float32)
    huggingface.save(tmp_path / "t5", params, tiny.FID, describe(tiny.FID, "v"))
    # The largest float32 numbers become infinite in bfloat16.
    with pytest.raises(ValueError, match="token_embedder/embedding.*512.*infinite"):
        export(
            GlimmerModel(tiny.FID),
            str(tmp_path / "t5"),
            str(tmp_path / "a.safetensors"),
            vocabulary=VOCABULARY,
        )
    assert not list(tmp_path.glob("a.*"))
