"""T5 folders of Hugging Face: every form gives the same bits, and what is wrong is named whole."""

import dataclasses
import json
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
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.weights import huggingface, parameters
from glimmer_jax.weights.huggingface_files import flax_places
from glimmer_jax.weights.lazy_arrays import open_array
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from tests.models import tiny

V1_0 = dataclasses.replace(
    tiny.FID, t5=dataclasses.replace(tiny.T5, mlp_activations=("relu",), tie_output=True)
)


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


@pytest.mark.parametrize("config", [tiny.FID, V1_0], ids=["v1.1", "v1.0"])
def test_written_and_read_again_every_bit_is_the_same(tmp_path, config):
    params = tiny.params(config)
    save(tmp_path, config)
    loaded = load(tmp_path)
    assert loaded.vocabulary_fingerprint is None
    assert dataclasses.replace(loaded.config.t5, scan_layers=True) == config.t5
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, config), params)
    assert "lm_head.weight" not in tensors_of(tmp_path) or not config.t5.tie_output
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"Hugging Face t5 in {tmp_path} (model.safetensors): {count:,}" in loaded.what


def flax_tree(tensors):
    """PyTorch's tensors as Flax has them: nested, kernels not transposed."""
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
    """Takes the place of `model.safetensors`."""
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


def test_several_files_with_an_index_give_the_same_bits(folder):
    want = load(folder).params
    with pytest.raises(ValueError, match="holds a model already. Remove it, or write into another"):
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
    (folder / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"lacks \['{files[1]}'\], which model.safetensors.index"):
        load(folder)


@pytest.mark.parametrize("num_files", [1, 3])
def test_flax_files_give_the_same_bits(folder, num_files):
    want = load(folder).params
    write_flax(folder, tensors_of(folder), num_files)
    loaded = load(folder)
    tiny.assert_trees_equal(loaded.params, want)
    words = "(flax_model.msgpack)" if num_files == 1 else "(3 Flax msgpack files)"
    assert words in loaded.what


def test_flax_reads_bfloat16_and_long_headers(tmp_path):
    numbers = {
        "half": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "long": np.arange(70_000, dtype=np.float32),  # a length of four bytes
        "last": np.arange(16, dtype=np.int8),
    }
    tree = {**numbers, "x" * 100: numbers, "none": {}}
    (tmp_path / "file").write_bytes(flax.serialization.msgpack_serialize(tree))
    kvstore = open_folder(tmp_path)
    places = flax_places(kvstore, "file")
    assert set(places) == set(flax.traverse_util.flatten_dict(tree))
    for path, place in places.items():
        got = np.asarray(open_array(kvstore, place))
        np.testing.assert_array_equal(got, numbers[path[-1]])
        assert got.dtype == numbers[path[-1]].dtype


@pytest.mark.parametrize("form", ["safetensors", "Flax msgpack"])
def test_files_in_a_bucket_give_the_same_bits(folder, serve, form):
    want = load(folder).params
    if form == "safetensors":
        shutil.rmtree(folder)
        save(folder, tiny.FID, file_bytes=20_000)
    else:
        write_flax(folder, tensors_of(folder), 2)
    url, server = serve(folder)
    # Opened twice: what was read already may still be at hand when the bucket refuses.
    loaded, unread = load(url), load(url)
    assert f"Hugging Face t5 in {url}" in loaded.what and form in loaded.what
    tiny.assert_trees_equal(loaded.params, want)
    server.status = 403
    with pytest.raises(OSError, match="could not be read.*run the same command again"):
        np.asarray(unread.params["token_embedder"]["embedding"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_and_copies_of_the_embedding_are_read(folder, dtype):
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


def test_a_start_for_glimmer_has_both_tables_and_a_fresh_head(folder, capsys):
    params = parameters.load(folder, GlimmerModel(tiny.GLIMMER), "sha256:any")
    want = tiny.params(tiny.FID)["live_encoder"]["relpos_bias"]
    for encoder in ("memory_encoder", "live_encoder"):
        tiny.assert_trees_equal(params[encoder]["relpos_bias"], want)
    assert (params["reranker"]["kernel"] == 1.0).all()
    assert f"Parameters: a Hugging Face t5 in {folder}" in capsys.readouterr().out
    wide = dataclasses.replace(tiny.FID, t5=dataclasses.replace(tiny.T5, vocab_size=64))
    with pytest.raises(ValueError, match="vocab_size=32 .*vocab_size=64"):
        parameters.load(folder, GlimmerModel(wide), "sha256:any")


def test_all_that_is_missing_extra_or_misshapen_is_named(folder, serve):
    tensors = tensors_of(folder)
    del tensors["encoder.block.2.layer.0.SelfAttention.q.weight"]
    tensors["encoder.block.9.layer.0.layer_norm.weight"] = np.ones(16, np.float32)
    tensors["decoder.final_layer_norm.weight"] = np.ones(8, np.float32)
    tensors["scalar"] = np.ones((), np.float32)
    rewrite(folder, tensors)
    message = (
        r"4 parameters differ: decoder.final_layer_norm.weight has shape \[8\] and not \[16\]; "
        r"encoder.block.2.*q.weight \[16, 16\] is missing; encoder.block.9.* is not wanted; "
        r"scalar \[\] is not wanted"
    )
    for place in (folder, serve(folder)[0]):
        with pytest.raises(ValueError, match=message):
            load(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "glimmer"}, "'glimmer', and its config.json does not say which model"),
        ({"model_type": "umt5"}, "model of type 'umt5'; only 't5' and 'mt5'"),
        (
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj 'gated-silu'; known are gated-gelu",
        ),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05"),
        ({"tie_word_embeddings": True}, "output layer of its own, and config.json says .* tied"),
    ],
)
def test_another_architecture_is_refused(folder, change, message):
    change_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_output_layer_that_is_the_embedding_is_told_from_the_weights(folder):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    rewrite(folder, tensors)
    # Not scaled: an output layer of its own, which starts as the embedding.
    loaded = load(folder)
    assert not loaded.config.t5.tie_output
    kernel = loaded.params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["shared.weight"].T)
    change_config(folder, tie_word_embeddings=True)
    assert load(folder).config.t5.tie_output


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"has config.json and neither.*'pytorch_model.bin'.*Pickled"
    ):
        load(folder)


@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_damaged_files_are_refused(folder, form):
    name = "model.safetensors"
    if form == "msgpack":
        write_flax(folder, tensors_of(folder), 1)
        name = "flax_model.msgpack"
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{name} ends before the array of shape"):
        load(folder)
    (folder / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=rf"{name} is no .* file, or is damaged"):
        load(folder)


def test_tensors_that_are_no_numbers_of_a_model_are_named(folder):
    rewrite(folder, {**tensors_of(folder), "extra": np.ones(3, np.int64)})
    with pytest.raises(ValueError, match="tensors of type I64; weights are read in F32, F16"):
        load(folder)


def test_arrays_in_chunks_are_refused(folder, monkeypatch):
    tensors = tensors_of(folder)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1024)
    write_flax(folder, tensors, 1)
    with pytest.raises(ValueError, match="holds .* in chunks .*Save the model as safetensors"):
        load(folder)


def test_only_known_activations_are_written(tmp_path):
    t5 = dataclasses.replace(tiny.T5, mlp_activations=("linear",))
    with pytest.raises(ValueError, match=r"no feed-forward with mlp_activations=\('linear',\)"):
        huggingface.save(tmp_path, {}, dataclasses.replace(tiny.FID, t5=t5), {})
