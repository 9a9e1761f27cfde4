"""Parameter files: half the size of float32, and damage is detected."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.weights import params_file
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import config_from, describe
from glimmer_jax.weights.params_file import load_params_file, save_params_file
from tests import damage
from tests.models import tiny


def test_matrices_are_bfloat16_and_come_back_as_float32(tmp_path):
    path, params = tmp_path / "glimmer.safetensors", tiny.params(tiny.GLIMMER)
    save_params_file(path, params, describe(tiny.GLIMMER, "sha256:v"))
    loaded = load(path)
    assert (loaded.config, loaded.vocabulary_fingerprint) == (tiny.GLIMMER, "sha256:v")
    assert loaded.what == f"{path}, a parameter file"
    num_parameters = sum(x.size for x in jax.tree.leaves(params))
    assert path.stat().st_size < 2.5 * num_parameters + 8000

    def check(loaded, original):
        assert loaded.dtype == np.float32
        rounded = original.astype(jnp.bfloat16) if original.ndim > 1 else original
        np.testing.assert_array_equal(loaded, rounded.astype(np.float32))

    jax.tree.map(check, loaded.params, params)


def test_unknown_settings_are_rejected_and_missing_ones_have_defaults(tmp_path):
    described = describe(tiny.FID, "v")
    del described["model_config"]["t5"]["relpos_buckets"]
    assert config_from(described, "here") == tiny.FID
    # Gin accepts an integer for a float, and JSON keeps it.
    described["model_config"]["t5"]["dropout_rate"] = 0
    assert config_from(described, "here") == tiny.FID
    # The implementation of attention is not part of the configuration.
    t5 = dataclasses.replace(tiny.T5, dtype="bfloat16", head_dim=8)
    on_gpu = dataclasses.replace(tiny.FID, t5=dataclasses.replace(t5, attention="cudnn"))
    assert config_from(describe(on_gpu, "v"), "here").t5 == t5
    described["model_config"]["hashing"] = True
    with pytest.raises(ValueError, match="here.*hashing"):
        config_from(described, "here")


def test_a_flipped_bit_of_the_description_is_rejected(tmp_path):
    path = tmp_path / "glimmer.safetensors"
    save_params_file(path, tiny.params(tiny.GLIMMER), describe(tiny.GLIMMER, "v"))
    described = path.with_suffix(".json")
    text = described.read_text()
    assert '"num_kept": 2' in text
    described.write_text(text.replace('"num_kept": 2', '"num_kept": 3'))
    with pytest.raises(ValueError, match="glimmer.json is damaged or was edited"):
        load(path)


def test_a_damaged_params_file_is_rejected(tmp_path):
    path = tmp_path / "small.safetensors"
    save_params_file(path, {"a": np.ones(3, np.float32)}, {})
    content = json.loads(path.with_suffix(".json").read_text())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_params_file(path)
    assert set(content) == {"sha256", "fields_sha256"}
    path.with_suffix(".json").write_text('{"sha')
    with pytest.raises(ValueError, match=r"small.json is not a valid JSON"):
        load_params_file(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"small.safetensors is missing"):
        load_params_file(path)
    with pytest.raises(ValueError, match="OUTPUT_PATH.*NAME.safetensors.*small.bin"):
        save_params_file(tmp_path / "small.bin", {}, {})


@pytest.mark.fault
@pytest.mark.parametrize("kind", damage.SPECIAL_FILES)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_what_is_no_file_is_rejected_without_blocking(tmp_path, kind, suffix):
    path = tmp_path / "small.safetensors"
    save_params_file(path, {"a": np.ones(3, np.float32)}, {})
    damage.SPECIAL_FILES[kind](path.with_suffix(suffix))
    with pytest.raises(ValueError, match=f"small{suffix}"):
        load_params_file(path)


def test_a_stop_leaves_the_former_pair(tmp_path):
    path = tmp_path / "small.safetensors"
    save_params_file(path, {"a": np.ones(3, np.float32)}, {})
    STOP.request()
    with pytest.raises(StopRequested):
        save_params_file(path, {"a": np.zeros(3, np.float32)}, {})
    np.testing.assert_array_equal(load_params_file(path)[0]["a"], np.ones(3))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_parameter_that_is_not_finite_is_reported(tmp_path):
    path = tmp_path / "small.safetensors"
    with pytest.raises(ValueError, match="a/b.*2 numbers.*3"):
        save_params_file(path, {"a": {"b": np.array([1, np.nan, np.inf], np.float32)}}, {})
    data = safetensors.numpy.save({"a/b": np.array([1, -np.inf], np.float32)})
    path.write_bytes(data)
    fields = {"sha256": hashlib.sha256(data).hexdigest()}
    whole = {**fields, "fields_sha256": params_file._fields_sha256(fields)}
    path.with_suffix(".json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="a/b.*1 numbers.*2"):
        load_params_file(path)


def test_a_pair_is_replaced_once_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    save_params_file(path, {"a": np.ones(3, np.float32)}, {})

    def full(self, data):
        self.write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(path)), "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            save_params_file(path, {"a": np.zeros(3, np.float32)}, {})
    assert len(list(tmp_path.iterdir())) == 2
    params, _ = load_params_file(path)
    np.testing.assert_array_equal(params["a"], np.ones(3))
    save_params_file(path, {"a": np.zeros(3, np.float32)}, {})
    np.testing.assert_array_equal(load_params_file(path)[0]["a"], np.zeros(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.json", "small.safetensors"]
