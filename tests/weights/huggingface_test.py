"""T5 folders of Hugging Face: all forms are read bit-exactly, and problems are named."""

import dataclasses
import json
import logging
import os
import shutil

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.weights import huggingface, msgpack_file, parameters
from glimmer_jax.weights.lazy_arrays import open_bytes
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from tests.models import tiny


def save(folder, config, **kwargs):
    huggingface.save(folder, tiny.params(config), config, describe(config, "v"), **kwargs)


@pytest.fixture
def folder(tmp_path):
    """T5 v1.1 in one safetensors file."""
    save(tmp_path / "t5", tiny.FID)
    return tmp_path / "t5"


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("config", [tiny.FID, tiny.V1_0], ids=["v1.1", "v1.0"])
def test_a_saved_t5_is_read_bit_exactly(tmp_path, config):
    params = tiny.params(config)
    save(tmp_path, config)
    loaded = load(tmp_path)
    assert loaded.vocabulary_fingerprint == "v"
    assert dataclasses.replace(loaded.config.t5, scan_layers=True) == config.t5
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, config), params)
    assert "lm_head.weight" not in tensors_of(tmp_path) or not config.t5.tie_output
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"Hugging Face t5 in {tmp_path} (model.safetensors): {count:,}" in loaded.what


def flax_tree(tensors):
    """PyTorch's tensors in Flax's form: nested, with kernels that are not transposed."""
    tree = {}
    for name, tensor in tensors.items():
        keys = name.split(".")[:-1]
        table = keys[-1] in ("shared", "relative_attention_bias")
        leaf = "embedding" if table else "kernel" if tensor.ndim > 1 else "weight"
        at = tree
        for key in keys:
            at = at.setdefault(key, {})
        at[leaf] = np.ascontiguousarray(tensor.T) if leaf == "kernel" else tensor
    return tree


def write_flax(folder, tensors, num_files):
    """Replaces `model.safetensors`."""
    (folder / "model.safetensors").unlink()
    if num_files == 1:
        data = flax.serialization.msgpack_serialize(flax_tree(tensors))
        (folder / "flax_model.msgpack").write_bytes(data)
        return
    weight_map = {}
    for i in range(num_files):
        file = f"flax_model-{i + 1:05d}-of-{num_files:05d}.msgpack"
        tree = flax_tree({name: tensors[name] for name in sorted(tensors)[i::num_files]})
        (folder / file).write_bytes(flax.serialization.msgpack_serialize(tree))
        weight_map |= dict.fromkeys(flax.traverse_util.flatten_dict(tree, sep="/"), file)
    index = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "flax_model.msgpack.index.json").write_text(index)


def test_several_files_with_an_index_are_read_bit_exactly(folder):
    want = load(folder).params
    with pytest.raises(ValueError, match="holds a model.*Remove it"):
        save(folder, tiny.FID, file_bytes=20_000)
    shutil.rmtree(folder)
    save(folder, tiny.FID, file_bytes=20_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * x.size for x in jax.tree.leaves(want))
    loaded = load(folder)
    tiny.assert_trees_equal(loaded.params, want)
    assert f"({len(files)} safetensors files)" in loaded.what
    # A killed export of fewer files: readers would prefer its weights.
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds model.safetensors of an export that did not end"):
        save(folder, tiny.FID, file_bytes=20_000)
    (folder / "model.safetensors").unlink()
    save(folder, tiny.FID, file_bytes=20_000)
    (folder / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"lacks.*{files[1]}.*model.safetensors.index"):
        load(folder)


def test_an_index_beside_a_complete_file_is_left_over(folder):
    want = load(folder).params
    weight_map = dict.fromkeys(tensors_of(folder), "model-00001-of-00001.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    loaded = load(folder)
    tiny.assert_trees_equal(loaded.params, want)
    assert "(model.safetensors)" in loaded.what


@pytest.mark.parametrize("num_files", [1, 3])
def test_flax_files_are_read_bit_exactly(folder, num_files):
    want = load(folder).params
    write_flax(folder, tensors_of(folder), num_files)
    loaded = load(folder)
    tiny.assert_trees_equal(loaded.params, want)
    description = "(flax_model.msgpack)" if num_files == 1 else "(3 Flax msgpack files)"
    assert description in loaded.what


def test_flax_reads_bfloat16_and_long_headers(tmp_path):
    numbers = {
        "half": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "long": np.arange(70_000, dtype=np.float32),  # its length takes four bytes
        "last": np.arange(16, dtype=np.float16),
    }
    tree = {**numbers, "x" * 100: numbers, "none": {}}
    (tmp_path / "file").write_bytes(flax.serialization.msgpack_serialize(tree))
    kvstore = open_folder(tmp_path)
    locations = msgpack_file.locations(kvstore, "file")
    assert set(locations) == set(flax.traverse_util.flatten_dict(tree))
    for path, location in locations.items():
        got = np.asarray(open_bytes(kvstore, location))
        np.testing.assert_array_equal(got, numbers[path[-1]])
        assert got.dtype == numbers[path[-1]].dtype


@pytest.mark.parametrize("form", ["safetensors", "Flax msgpack"])
def test_files_in_a_bucket_are_read_bit_exactly(folder, serve, form):
    want = load(folder).params
    if form == "safetensors":
        shutil.rmtree(folder)
        save(folder, tiny.FID, file_bytes=20_000)
    else:
        write_flax(folder, tensors_of(folder), 2)
    url, server = serve(folder)
    # Opened twice, because slices that were read may be cached when the bucket denies access.
    loaded, unread = load(url), load(url)
    assert f"Hugging Face t5 in {url}" in loaded.what and form in loaded.what
    tiny.assert_trees_equal(loaded.params, want)
    server.status = 403
    with pytest.raises(OSError, match="could not be read.*command again"):
        np.asarray(unread.params["token_embedder"]["embedding"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_and_equal_copies_of_the_embedding_are_read(folder, dtype):
    want = load(folder).params
    tensors = tensors_of(folder)
    half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    half["encoder.embed_tokens.weight"] = half["shared.weight"]
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    half[unread] = np.ones((32, 4), dtype)
    rewrite(folder, half)
    params = load(folder).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    tiny.assert_trees_close(params, want, rtol=1e-2)


def test_a_t5_becomes_a_glimmer_with_two_tables_and_a_new_head(folder, caplog, capsys):
    caplog.set_level(logging.INFO)
    params = parameters.load(folder, GlimmerModel(tiny.GLIMMER), "v")
    want = tiny.params(tiny.FID)["live_encoder"]["relpos_bias"]
    for encoder in ("memory_encoder", "live_encoder"):
        tiny.assert_trees_equal(params[encoder]["relpos_bias"], want)
    assert (params["reranker"]["kernel"] == 1.0).all()
    assert f"Parameters: a Hugging Face t5 in {folder}" in caplog.text
    assert capsys.readouterr().out == ""
    wide = dataclasses.replace(tiny.FID, t5=dataclasses.replace(tiny.T5, vocab_size=64))
    with pytest.raises(ValueError, match="vocab_size=32 .*vocab_size=64"):
        parameters.load(folder, GlimmerModel(wide), "v")


def test_missing_extra_and_misshapen_parameters_are_all_reported(folder, serve):
    tensors = tensors_of(folder)
    del tensors["encoder.block.2.layer.0.SelfAttention.q.weight"]
    tensors["encoder.block.9.layer.0.layer_norm.weight"] = np.ones(16, np.float32)
    tensors["decoder.final_layer_norm.weight"] = np.ones(8, np.float32)
    tensors["scalar"] = np.ones((), np.float32)
    rewrite(folder, tensors)
    message = (
        r"4 parameters differ.*decoder.final_layer_norm.weight .*\[8\].*\[16\]; "
        r"encoder.block.2.*q.weight \[16, 16\].*missing; encoder.block.9.*unexpected; "
        r"scalar \[\].*unexpected"
    )
    for path in (folder, serve(folder)[0]):
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "glimmer"}, "'glimmer'.*model_config"),
        ({"model_type": "umt5"}, "model_type 'umt5'.*t5, mt5"),
        (
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj 'gated-silu'.*gated-gelu",
        ),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05.*1e-06"),
        ({"decoder_start_token_id": 3}, "decoder_start_token_id 3.*0"),
        ({"dense_act_fn": "silu"}, "dense_act_fn 'silu'.*gelu_new"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance 8.*buckets 32"),
        ({"num_layers": 3_000_000}, "num_encoder_layers is 3000000.*512"),
        ({"num_layers": 500}, "config.*502 layers.*parameters"),
        ({"num_heads": "4"}, "num_heads is '4'"),
        ({"d_model": -16}, "emb_dim is -16"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs.*tie_word_embeddings"),
    ],
)
def test_another_architecture_is_rejected(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_tied_output_layer_is_recognised_by_its_weights(folder):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    rewrite(folder, tensors)
    # Tied without the scale is untied, with the embedding as the initial value.
    loaded = load(folder)
    assert not loaded.config.t5.tie_output
    kernel = loaded.params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["shared.weight"].T)
    change_config(folder, tie_word_embeddings=True)
    assert load(folder).config.t5.tie_output


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="config.json.*model.safetensors.*pytorch_model.bin.*safe_serialization"
    ):
        load(folder)


@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_truncated_and_damaged_files_are_rejected(folder, form):
    name = "model.safetensors"
    if form == "msgpack":
        write_flax(folder, tensors_of(folder), 1)
        name = "flax_model.msgpack"
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{name} is truncated"):
        load(folder)
    (folder / name).write_bytes(data)
    opened = load(folder).params
    os.truncate(folder / name, 10)  # A mapped file: without a check reading ends with SIGBUS.
    with pytest.raises(ValueError, match=f"{name} is truncated"):
        parameters.read(opened)
    (folder / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=f"{name} .*valid .*damaged"):
        load(folder)


def test_tensors_of_integers_are_reported(folder):
    rewrite(folder, {**tensors_of(folder), "extra": np.ones(3, np.int64)})
    with pytest.raises(ValueError, match="extra as I64.*float32, float16"):
        load(folder)


def test_arrays_in_chunks_are_rejected(folder, monkeypatch):
    tensors = tensors_of(folder)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1024)
    write_flax(folder, tensors, 1)
    with pytest.raises(ValueError, match="in chunks.*safetensors"):
        load(folder)


def test_unknown_activations_are_not_written(tmp_path):
    t5 = dataclasses.replace(tiny.T5, mlp_activations=("linear",))
    with pytest.raises(ValueError, match=r"mlp_activations=\('linear',\).*OUTPUT_FORMAT"):
        huggingface.save(tmp_path, {}, dataclasses.replace(tiny.FID, t5=t5), {})


COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (tiny.FID, COPIES[0]),
        (tiny.FID, COPIES[1]),
        (tiny.V1_0, COPIES[0]),
        (tiny.V1_0, "lm_head.weight"),
    ],
)
def test_the_embedding_is_read_under_each_of_its_names(tmp_path, config, name):
    save(tmp_path, config)
    want = load(tmp_path).params
    tensors = tensors_of(tmp_path)
    tensors[name] = tensors.pop("shared.weight")
    rewrite(tmp_path, tensors)
    tiny.assert_trees_equal(load(tmp_path).params, want)


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_the_embedding_that_differ_are_rejected(folder, name):
    tensors = tensors_of(folder)
    rewrite(folder, {**tensors, name: tensors["shared.weight"] + 1})
    with pytest.raises(ValueError, match=f"{name} differs from shared.weight"):
        load(folder)


def test_an_untied_output_layer_is_not_taken_for_the_embedding(folder):
    tensors = tensors_of(folder)
    del tensors["shared.weight"]
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match="shared.weight.*missing"):
        load(folder)


@pytest.mark.parametrize("name", ["d_kv", "vocab_size", "num_heads"])
def test_a_missing_size_has_the_default_of_transformers(folder, name):
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    # The default is not the size of this model.
    with pytest.raises(ValueError, match="parameters differ.*weight has shape"):
        load(folder)


def test_a_parameter_that_is_not_finite_is_reported(folder):
    tensors = tensors_of(folder)
    tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"][0, 0] = np.inf
    rewrite(folder, tensors)
    model = GlimmerModel(tiny.FID)
    params = parameters.load(folder, model, "v")
    with pytest.raises(ValueError, match="decoder/layers.*/mlp/wo/kernel.* 1 numbers.*infinite"):
        parameters.place(params, model, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.mark.parametrize("version", ["4.57.0", "5.0.0", None])
def test_a_tied_mt5_is_scaled_only_by_transformers_4(tmp_path, version):
    save(tmp_path, tiny.V1_0)
    change_config(tmp_path, model_type="mt5", transformers_version=version)
    assert load(tmp_path).config.t5.tie_output == (version == "4.57.0")
