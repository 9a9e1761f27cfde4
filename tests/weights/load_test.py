"""Paths that are not checkpoints are rejected, with a hint what to give instead."""

import re

import flax.serialization
import pytest

from glimmer_jax.weights import t5x
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from tests.models import tiny


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".pkl"])
def test_a_pickled_file_is_rejected_by_its_name(tmp_path, ending):
    file = tmp_path / f"pytorch_model{ending}"
    file.write_bytes(b"never opened")
    with pytest.raises(ValueError, match=rf"{ending} is pickled.*safe_serialization"):
        load(file)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "config.json", "checkpoint_7/checkpoint"])
def test_a_single_file_of_a_folder_is_rejected_in_favour_of_the_folder(tmp_path, name, monkeypatch):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    message = rf"{re.escape(str(file))} is a single file.*folder, {re.escape(str(file.parent))}\."
    with pytest.raises(ValueError, match=message):
        load(file)
    monkeypatch.chdir(file.parent)
    with pytest.raises(ValueError, match=r"single file.*folder, \.\."):
        load(file.name)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_hugging_face_safetensors_file_needs_its_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    message = rf"\.json is missing.*Hugging Face.*folder, {re.escape(str(tmp_path))}\."
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_a_file_named_checkpoint_that_is_not_of_t5x_is_rejected(tmp_path):
    t5x.save(tmp_path, tiny.params(tiny.FID), describe(tiny.FID, "v"))
    intact = (tmp_path / "checkpoint").read_bytes()
    contents = {
        "TensorFlow's": b'model_checkpoint_path: "model.ckpt-1000000"\n',
        "truncated": intact[:-5],
        "a list": flax.serialization.msgpack_serialize([1, 2]),
        "a number": b"\x07",
    }
    for data in contents.values():
        (tmp_path / "checkpoint").write_bytes(data)
        message = "checkpoint is not a valid T5X checkpoint.*TensorFlow"
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
