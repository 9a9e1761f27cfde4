"""Mode `export`: one file of ours, or a folder under the names of others."""

import types

import pytest

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.modes.export import export
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny

VOCABULARY = types.SimpleNamespace(fingerprint="v")


@pytest.mark.parametrize(
    ("output", "form", "found"),
    [
        ("again.safetensors", "huggingface", "a parameter file"),
        ("t5", "huggingface", "huggingface, a T5"),
        ("checkpoint_0", "t5x", "t5x, a T5"),
    ],
)
def test_all_forms_hold_the_parameters_of_the_checkpoint(tmp_path, output, form, found, capsys):
    path = tmp_path / "fid.safetensors"
    save_params_file(path, tiny.params(tiny.FID), describe(tiny.FID, "v"))
    export(GlimmerModel(tiny.FID), str(path), str(tmp_path / output), form, VOCABULARY)
    assert f"Wrote {tmp_path / output}: {found}." in capsys.readouterr().out
    loaded = load(tmp_path / output)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), load(path).params)


def test_another_form_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="OUTPUT_FORMAT is one of huggingface, t5x, t5x_adapter, got 'onnx'"
    ):
        export(GlimmerModel(tiny.FID), "in", str(tmp_path / "out"), "onnx", VOCABULARY)


def test_t5x_starts_any_cut_of_ours_from_its_own_tree(tmp_path, capsys):
    path = tmp_path / "glimmer.safetensors"
    save_params_file(path, tiny.params(tiny.GLIMMER), describe(tiny.GLIMMER, "v"))
    output = tmp_path / "start" / "checkpoint_0"
    export(GlimmerModel(tiny.GLIMMER), str(path), str(output), "t5x_adapter", VOCABULARY)
    assert f"Wrote {output}: t5x_adapter, our own tree." in capsys.readouterr().out
    tiny.assert_trees_equal(load(output).params, load(path).params)
