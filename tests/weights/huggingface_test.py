"""T5 folders of Hugging Face: every form gives the same bits, and what is wrong is named whole."""

import dataclasses
import json

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.recut import recut
from glimmer_jax.weights import huggingface, parameters
from glimmer_jax.weights.load import load
from tests.models import tiny

V1_0 = dataclasses.replace(
    tiny.FID, t5=dataclasses.replace(tiny.T5, mlp_activations=("relu",), tie_output=True)
)


@pytest.fixture
def folder(tmp_path):
    """T5 v1.1 in one safetensors file."""
    huggingface.save(tmp_path / "t5", tiny.params(tiny.FID), tiny.FID)
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
    huggingface.save(tmp_path, params, config)
    loaded = load(tmp_path)
    assert loaded.vocabulary_fingerprint is None
    assert dataclasses.replace(loaded.config.t5, scan_layers=True) == config.t5
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, config), params)
    assert "lm_head.weight" not in tensors_of(tmp_path) or not config.t5.tie_output
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"Hugging Face t5 in {tmp_path} (model.safetensors): {count:,}" in loaded.what


def test_several_files_with_an_index_and_flax_give_the_same_bits(folder):
    want = load(folder).params
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    tree = {}
    for name, tensor in tensors.items():
        keys = name.split(".")[:-1]
        table = keys[-1] in ("shared", "relative_attention_bias")
        leaf = "embedding" if table else "kernel" if tensor.ndim > 1 else "weight"
        at = tree
        for key in keys:
            at = at.setdefault(key, {})
        at[leaf] = np.ascontiguousarray(tensor.T) if leaf == "kernel" else tensor
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    loaded = load(folder)
    tiny.assert_trees_equal(loaded.params, want)
    assert "(flax_model.msgpack)" in loaded.what

    parts = {f"part-{i}.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    loaded = load(folder)
    tiny.assert_trees_equal(loaded.params, want)
    assert "(2 safetensors files)" in loaded.what
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks \['part-1.safetensors'\]"):
        load(folder)


def test_half_precision_and_copies_of_the_embedding_are_read(folder):
    want = load(folder).params
    tensors = tensors_of(folder)
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    half["encoder.embed_tokens.weight"] = half["shared.weight"]
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    half[unread] = np.ones((32, 4), np.float16)
    rewrite(folder, half)
    params = load(folder).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    tiny.assert_trees_close(params, want, rtol=1e-3)


def test_a_start_for_glimmer_has_both_tables_and_a_fresh_head(folder, capsys):
    params = parameters.load(folder, GlimmerModel(tiny.GLIMMER), "sha256:any")
    want = tiny.params(tiny.FID)["live_encoder"]["relpos_bias"]
    for encoder in ("memory_encoder", "live_encoder"):
        tiny.assert_trees_equal(params[encoder]["relpos_bias"], want)
    assert (params["reranker"]["kernel"] == 1.0).all()
    assert f"Parameters: a Hugging Face t5 in {folder}" in capsys.readouterr().out
    wide = dataclasses.replace(tiny.FID, t5=dataclasses.replace(tiny.T5, vocab_size=64))
    with pytest.raises(ValueError, match="vocab_size=32 cannot become one with vocab_size=64"):
        parameters.load(folder, GlimmerModel(wide), "sha256:any")


def test_all_that_is_missing_extra_or_misshapen_is_named(folder):
    tensors = tensors_of(folder)
    del tensors["encoder.block.2.layer.0.SelfAttention.q.weight"]
    tensors["encoder.block.9.layer.0.layer_norm.weight"] = np.ones(16, np.float32)
    tensors["decoder.final_layer_norm.weight"] = np.ones(8, np.float32)
    rewrite(folder, tensors)
    message = (
        r"3 parameters differ: decoder.final_layer_norm.weight has shape \[8\] and not \[16\]; "
        r"encoder.block.2.*q.weight \[16, 16\] is missing; encoder.block.9.* is not wanted"
    )
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
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


def test_only_fid_with_known_activations_is_written(tmp_path):
    with pytest.raises(
        ValueError, match="memory_layers=2, rerank_layers=1. Export with gin/models"
    ):
        huggingface.save(tmp_path, tiny.params(tiny.GLIMMER), tiny.GLIMMER)
    t5 = dataclasses.replace(tiny.T5, mlp_activations=("linear",))
    with pytest.raises(ValueError, match=r"no feed-forward with mlp_activations=\('linear',\)"):
        huggingface.save(tmp_path, {}, dataclasses.replace(tiny.FID, t5=t5))
