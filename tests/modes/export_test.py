"""Mode `export`: one file of ours, or the folder of a T5 for others."""

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


@pytest.mark.parametrize("output", ["again.safetensors", "t5"])
def test_both_forms_hold_the_parameters_of_the_checkpoint(tmp_path, output):
    path = tmp_path / "fid.safetensors"
    save_params_file(path, tiny.params(tiny.FID), describe(tiny.FID, "v"))
    export(GlimmerModel(tiny.FID), str(path), str(tmp_path / output), VOCABULARY)
    loaded = load(tmp_path / output)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, tiny.FID), load(path).params)


def test_a_divided_encoder_is_no_t5(tmp_path):
    path = tmp_path / "glimmer.safetensors"
    save_params_file(path, tiny.params(tiny.GLIMMER), describe(tiny.GLIMMER, "v"))
    with pytest.raises(ValueError, match="Export with gin/models/fid.gin"):
        export(GlimmerModel(tiny.GLIMMER), str(path), str(tmp_path / "t5"), VOCABULARY)
