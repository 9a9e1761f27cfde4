"""GTR from the files of sentence-transformers: parity with PyTorch, and rejected folders."""

import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from glimmer_jax.models.gtr import Gtr
from glimmer_jax.models.stacking import stack_layers
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.weights.sentence_transformers import load_gtr
from tests.models import torch_t5
from tests.retrieval import tiny_gtr


@pytest.fixture
def folder(tmp_path):
    return tiny_gtr.write(tmp_path / "gtr")


def texts(rows=4, length=40):
    """Ragged rows of tokens, and one of padding alone."""
    random = np.random.default_rng(1)
    tokens = random.integers(2, tiny_gtr.T5.vocab_size, (rows, length)).astype(np.int32)
    tokens[np.arange(length) >= np.array([length, 17, 1, 0])[:, None]] = 0
    return tokens


def vectors_of(gtr, tokens):
    model = Gtr(gtr.t5, gtr.vector_dim)
    return np.asarray(jax.jit(model.apply)({"params": gtr.params}, tokens))


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_vectors_equal_those_of_pytorch(folder, activation):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    t5 = tiny_gtr.T5
    config = torch_t5.settings(t5, feed_forward_proj=activation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        model = transformers.T5EncoderModel(config).eval()
        model.save_pretrained(folder)
    linear = torch.nn.Linear(t5.emb_dim, tiny_gtr.VECTOR_DIM, bias=False)
    weight = {"linear.weight": linear.weight.detach().numpy()}
    safetensors.numpy.save_file(weight, folder / "2_Dense" / "model.safetensors")

    tokens = texts()[:3]
    with torch.no_grad():
        mask = torch.tensor(tokens > 0)
        ids = torch.tensor(tokens.astype(np.int64))
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        want = torch.nn.functional.normalize(linear(mean), dim=1).numpy()
    gtr = load_gtr(folder)
    np.testing.assert_allclose(vectors_of(gtr, tokens), want, rtol=0, atol=1e-5)
    # Different texts have different vectors, so the tolerance is meaningful.
    assert np.abs(want[0] - want[1]).max() > 0.05


def test_vectors_have_length_one_and_ignore_padding(folder):
    gtr = load_gtr(folder)
    tokens = texts()
    vectors = vectors_of(gtr, tokens)
    np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1, rtol=1e-6)
    assert (vectors[3] == 0).all()
    np.testing.assert_allclose(vectors_of(gtr, tokens[1:3, :17]), vectors[1:3], atol=1e-6)


def test_scanned_layers_give_the_same_vectors(folder):
    gtr = load_gtr(folder)
    t5 = T5Config(**{**vars(gtr.t5), "scan_layers": True})
    stacked = Gtr(t5, gtr.vector_dim).apply({"params": stack_layers(gtr.params)}, texts())
    np.testing.assert_allclose(stacked, vectors_of(gtr, texts()), atol=1e-6)


def test_the_folder_is_described_and_fingerprinted(folder, tmp_path):
    gtr = load_gtr(folder)
    assert f"a GTR in {folder}" in gtr.what and "vectors of 48" in gtr.what
    assert (gtr.max_length, gtr.vector_dim) == (tiny_gtr.MAX_LENGTH, tiny_gtr.VECTOR_DIM)
    assert gtr.fingerprint == load_gtr(folder).fingerprint
    assert gtr.fingerprint != load_gtr(tiny_gtr.write(tmp_path / "other", seed=1)).fingerprint
    (folder / "sentence_bert_config.json").unlink()
    assert load_gtr(folder).max_length == 512


def change(folder, name, **changes):
    path = folder / name
    tiny_gtr.save_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, r"cls_token.*mean_tokens"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "max_tokens.*mean_tokens"),
        ("2_Dense/config.json", {"bias": True}, "bias True.*no bias"),
        ("2_Dense/config.json", {"activation_function": "a.Tanh"}, "activation 'Tanh'"),
        ("2_Dense/config.json", {"out_features": 13}, r"linear.weight.*\(13, 64\)"),
        ("config.json", {"d_model": 8}, "64 channels.*encoder.* 8"),
        ("config.json", {"num_layers": 3}, "encoder.block.2.*missing"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length 'x'"),
        ("config.json", {"model_type": "bert"}, "model_type 'bert'.*t5"),
    ],
)
def test_another_model_is_rejected(folder, name, changes, message):
    change(folder, name, **changes)
    with pytest.raises(ValueError, match=message):
        load_gtr(folder)


def test_prompts_are_rejected_unless_they_are_empty(folder):
    path = folder / "config_sentence_transformers.json"
    tiny_gtr.save_json(path, {"prompts": {"query": ""}, "default_prompt_name": None})
    assert load_gtr(folder).vector_dim == tiny_gtr.VECTOR_DIM
    for prompts in ({"prompts": {"query": "query: "}}, {"default_prompt_name": "query"}):
        tiny_gtr.save_json(path, prompts)
        with pytest.raises(ValueError, match="config_sentence_transformers.json.*prompts"):
            load_gtr(folder)


def test_the_embedding_is_read_under_the_name_of_its_copy(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    want = load_gtr(folder).fingerprint
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    safetensors.numpy.save_file(tensors, file)
    assert load_gtr(folder).fingerprint == want


def test_modules_outside_the_folder_are_rejected(folder):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../1_Pooling"
    tiny_gtr.save_json(folder / "modules.json", modules)
    with pytest.raises(ValueError, match="modules.json.*outside.*1_Pooling"):
        load_gtr(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "mean"},
        {"pooling_mode": ["mean"]},
        {"pooling_mode": None, "pooling_mode_mean_tokens": 1},
    ],
)
def test_the_pooling_mode_of_newer_folders_is_read(folder, config):
    tiny_gtr.save_json(folder / "1_Pooling" / "config.json", config)
    assert load_gtr(folder).vector_dim == tiny_gtr.VECTOR_DIM


def test_pickled_weights_are_not_opened(folder):
    dense = folder / "2_Dense"
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    message = "2_Dense has no model.safetensors.*pytorch_model.bin.*Pickled.*save_file"
    with pytest.raises(ValueError, match=message):
        load_gtr(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (dense / "pytorch_model.bin").rename(dense / "model.safetensors")
    with pytest.raises(ValueError, match="pytorch_model.bin.*Pickled"):
        load_gtr(folder)


def test_missing_files_are_reported(folder):
    (folder / "spiece.model").unlink()
    with pytest.raises(ValueError, match="spiece.model.*T5's"):
        load_gtr(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ValueError, match="1_Pooling/config.json is missing"):
        load_gtr(folder)
    listed = json.loads((folder / "modules.json").read_text())
    tiny_gtr.save_json(folder / "modules.json", listed[:2])
    with pytest.raises(ValueError, match=r"\['Transformer', 'Pooling'\].*Dense"):
        load_gtr(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match="no modules.json.*sentence-transformers"):
        load_gtr(folder)
