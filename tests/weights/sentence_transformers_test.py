"""GTR from the files of sentence-transformers: PyTorch's vectors, and what is refused."""

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


def vectors_of(found, tokens, t5=None):
    model = Gtr(t5 or found.t5, found.vector_dim)
    return np.asarray(jax.jit(model.apply)({"params": found.params}, tokens))


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_vectors_equal_those_of_pytorchs_encoder_with_the_same_head(folder, activation):
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
    found = load_gtr(folder)
    np.testing.assert_allclose(vectors_of(found, tokens), want, rtol=0, atol=1e-5)
    # Different texts are told apart: the tolerance means something.
    assert np.abs(want[0] - want[1]).max() > 0.05


def test_vectors_have_length_one_and_do_not_see_padding(folder):
    found = load_gtr(folder)
    tokens = texts()
    vectors = vectors_of(found, tokens)
    np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1, rtol=1e-6)
    assert (vectors[3] == 0).all()
    np.testing.assert_allclose(vectors_of(found, tokens[1:3, :17]), vectors[1:3], atol=1e-6)


def test_scanned_layers_give_the_same_vectors(folder):
    found = load_gtr(folder)
    t5 = T5Config(**{**vars(found.t5), "scan_layers": True})
    stacked = Gtr(t5, found.vector_dim).apply({"params": stack_layers(found.params)}, texts())
    np.testing.assert_allclose(stacked, vectors_of(found, texts()), atol=1e-6)


def test_what_was_found_is_told_and_fingerprinted(folder, tmp_path):
    found = load_gtr(folder)
    assert f"a GTR in {folder}" in found.what and "vectors of 48" in found.what
    assert (found.max_length, found.vector_dim) == (tiny_gtr.MAX_LENGTH, tiny_gtr.VECTOR_DIM)
    assert found.fingerprint == load_gtr(folder).fingerprint
    assert found.fingerprint != load_gtr(tiny_gtr.write(tmp_path / "other", seed=1)).fingerprint
    (folder / "sentence_bert_config.json").unlink()
    assert load_gtr(folder).max_length == 512


def change(folder, name, **changes):
    path = folder / name
    tiny_gtr.save_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, r"cls_token.*takes the mean"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "max_tokens.*takes the mean"),
        ("2_Dense/config.json", {"bias": True}, "has bias True.*no bias and no activation"),
        ("2_Dense/config.json", {"activation_function": "a.Tanh"}, "activation 'Tanh'"),
        ("2_Dense/config.json", {"out_features": 13}, r"linear.weight.*\(13, 64\)"),
        ("config.json", {"d_model": 8}, "takes 64 channels, and the encoder in .* gives 8"),
        ("config.json", {"num_layers": 3}, "encoder.block.2.* is missing"),
        ("config.json", {"model_type": "bert"}, "model of type 'bert'"),
    ],
)
def test_another_model_is_refused(folder, name, changes, message):
    change(folder, name, **changes)
    with pytest.raises(ValueError, match=message):
        load_gtr(folder)


def test_newer_folders_name_the_mean_in_one_word(folder):
    tiny_gtr.save_json(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    assert load_gtr(folder).vector_dim == tiny_gtr.VECTOR_DIM


def test_pickled_weights_are_not_opened(folder):
    dense = folder / "2_Dense"
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    message = r"2_Dense has no model.safetensors, but \['pytorch_model.bin'\]. Pickled.*save_file"
    with pytest.raises(ValueError, match=message):
        load_gtr(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (dense / "pytorch_model.bin").rename(dense / "model.safetensors")
    with pytest.raises(ValueError, match="Pickled weights .* are not read"):
        load_gtr(folder)


def test_files_that_are_missing_are_named(folder):
    (folder / "spiece.model").unlink()
    with pytest.raises(ValueError, match=r"has no spiece.model.*Put T5's there"):
        load_gtr(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ValueError, match="1_Pooling/config.json is missing"):
        load_gtr(folder)
    listed = json.loads((folder / "modules.json").read_text())
    tiny_gtr.save_json(folder / "modules.json", listed[:2])
    with pytest.raises(ValueError, match=r"holds the modules \['Transformer', 'Pooling'\]"):
        load_gtr(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match="no modules.json: it is not a folder of sentence"):
        load_gtr(folder)
