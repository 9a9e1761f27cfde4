"""Parity with PyTorch: a T5 saved by transformers, and an exported one that transformers reads.

v1.1 covers Flan-T5 as well, which differs in its numbers only.
"""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest

from glimmer_jax.models.glimmer import Glimmer
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.objective import LossConfig
from glimmer_jax.models.selection import fuse, select
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.weights import huggingface, parameters, t5_names
from glimmer_jax.weights.huggingface_names import their_name, transposed
from glimmer_jax.weights.model_config import describe
from tests.models import tiny, torch_t5

pytestmark = pytest.mark.parity

VERSIONS = {
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
}
T5 = {
    "v1.1": tiny.T5,
    "v1.0": dataclasses.replace(tiny.T5, mlp_activations=("relu",), tie_output=True),
}
TOLERANCE = dict(rtol=0, atol=1e-4)


def batch(passages):
    """Without padding: PyTorch reads every text as it is."""
    full = tiny.batch(rows=2, passages=passages, gold=False)
    full = {name: np.where(x == 0, 2, x) for name, x in full.items()}
    return {**full, "decoder_loss_weights": np.ones((2, tiny.T), np.float32)}


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request, tmp_path_factory):
    """(torch, its random T5, our FiD, its parameters from the folder that PyTorch has written)."""
    version, folder = request.param, tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from transformers
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        t5 = T5[version]
        torch.manual_seed(3)
        config = torch_t5.settings(t5, **VERSIONS[version])
        model = transformers.T5ForConditionalGeneration(config).eval()
        if version == "v1.1":
            weight = torch.randn(t5.vocab_size, t5.emb_dim) / t5.emb_dim**0.5
            model.lm_head.weight = torch.nn.Parameter(weight)
        model.save_pretrained(folder)
    # The folder holds what the published ones hold.
    written = json.loads((folder / "config.json").read_text())
    assert written["feed_forward_proj"] == VERSIONS[version]["feed_forward_proj"]
    fid = dataclasses.replace(tiny.FID, t5=t5)
    params = parameters.load(folder, GlimmerModel(fid), "v")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return torch, model, fid, parameters.place(params, GlimmerModel(fid), mesh)


def texts(batch, passage):
    """`[question passage]` of every row."""
    parts = [batch["question_tokens"], batch["passage_tokens"][:, passage]]
    return np.concatenate(parts, axis=1).astype(np.int64)


def ours(fid, params, batch):
    """Encoder states `[B, S, D]` and logits."""

    def run(module, batch):
        live = module.rerank(batch)
        states, mask, _ = select(live, None)
        encoded, mask = fuse(module.read(states, mask), mask)
        return encoded, module.decode(encoded, mask, batch["decoder_input_tokens"])

    apply = lambda params, batch: Glimmer(fid).apply({"params": params}, batch, method=run)  # noqa: E731
    return jax.jit(apply, compiler_options=tiny.QUICK)(params, batch)


def test_states_logits_loss_and_gradients_equal_those_of_pytorch(pair):
    torch, model, fid, params = pair
    single = batch(passages=1)
    model.zero_grad()
    out = model(
        input_ids=torch.tensor(texts(single, 0)),
        decoder_input_ids=torch.tensor(single["decoder_input_tokens"].astype(np.int64)),
        labels=torch.tensor(single["decoder_target_tokens"].astype(np.int64)),
    )
    out.loss.backward()
    states, logits = ours(fid, params, single)
    np.testing.assert_allclose(states, out.encoder_last_hidden_state.detach().numpy(), **TOLERANCE)
    want = out.logits.detach().numpy()
    np.testing.assert_allclose(logits, want, **TOLERANCE)
    assert np.std(want) > 0.3

    (loss, _), grads = tiny.loss_and_grad(fid, LossConfig(z_loss=0.0))(params, single)
    np.testing.assert_allclose(loss, out.loss.item(), **TOLERANCE)
    theirs = {name: leaf.grad.numpy() for name, leaf in model.named_parameters()}
    flat = t5_names.flat_from(grads)
    assert {their_name(name, fid) for name in flat} == set(theirs)
    for name, leaf in flat.items():
        grad = theirs[their_name(name, fid)]
        grad = grad.T if transposed(name) else grad
        np.testing.assert_allclose(leaf, grad, rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.abs(grad).max() > 1e-4


def test_fid_equals_pytorch_with_concatenated_encoder_states(pair):
    torch, model, fid, params = pair
    three = batch(passages=3)
    with torch.no_grad():
        encoded = [
            model.encoder(input_ids=torch.tensor(texts(three, passage))).last_hidden_state
            for passage in range(3)
        ]
        encoded = torch.cat(encoded, dim=1)
        ids = torch.tensor(three["decoder_input_tokens"].astype(np.int64))
        want = model(encoder_outputs=(encoded,), decoder_input_ids=ids).logits.numpy()
    states, logits = ours(fid, params, three)
    np.testing.assert_allclose(states, encoded.numpy(), **TOLERANCE)
    np.testing.assert_allclose(logits, want, **TOLERANCE)


def test_an_exported_fid_has_the_same_logits_in_transformers(pair, tmp_path):
    torch, model, fid, _ = pair
    params = tiny.params(fid)
    huggingface.save(tmp_path, params, fid, describe(fid, "v"), file_bytes=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from transformers
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    single = batch(passages=1)
    with torch.no_grad():
        want = loaded.eval()(
            input_ids=torch.tensor(texts(single, 0)),
            decoder_input_ids=torch.tensor(single["decoder_input_tokens"].astype(np.int64)),
        ).logits.numpy()
    np.testing.assert_allclose(ours(fid, params, single)[1], want, **TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_an_mt5_saved_by_transformers_has_the_same_logits(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    settings = torch_t5.settings(tiny.T5, feed_forward_proj="gated-gelu").to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from transformers
        names = transformers.MT5Config().to_dict().keys() - {"model_type", "transformers_version"}
        config = transformers.MT5Config(**{n: settings[n] for n in names if n in settings})
        model = transformers.MT5ForConditionalGeneration(config).eval()
        if not tied:
            weight = torch.randn(tiny.T5.vocab_size, tiny.T5.emb_dim) / tiny.T5.emb_dim**0.5
            model.lm_head.weight = torch.nn.Parameter(weight)
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mt5"
    params = parameters.load(tmp_path, GlimmerModel(tiny.FID), "v")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = parameters.place(params, GlimmerModel(tiny.FID), mesh)
    single = batch(passages=1)
    with torch.no_grad():
        want = model(
            input_ids=torch.tensor(texts(single, 0)),
            decoder_input_ids=torch.tensor(single["decoder_input_tokens"].astype(np.int64)),
        ).logits.numpy()
    np.testing.assert_allclose(ours(tiny.FID, params, single)[1], want, **TOLERANCE)
    assert np.std(want) > 0.3
