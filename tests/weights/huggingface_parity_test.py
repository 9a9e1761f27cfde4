"""A T5 saved by PyTorch, read as INITIAL_CHECKPOINT_PATH reads it, answers as PyTorch does."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.weights import parameters
from tests.models import tiny

VERSIONS = {
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
}


def save_torch_t5(folder, version):
    """Random weights in a folder; returns `(input_ids, decoder_input_ids) -> logits`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    t5 = tiny.T5
    torch.manual_seed(3)
    config = transformers.T5Config(
        vocab_size=t5.vocab_size,
        d_model=t5.emb_dim,
        d_kv=t5.head_dim,
        d_ff=t5.mlp_dim,
        num_layers=t5.num_encoder_layers,
        num_decoder_layers=t5.num_decoder_layers,
        num_heads=t5.num_heads,
        decoder_start_token_id=0,
        **VERSIONS[version],
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if version == "v1.1":
        weight = torch.randn(t5.vocab_size, t5.emb_dim) / t5.emb_dim**0.5
        model.lm_head.weight = torch.nn.Parameter(weight)
    model.save_pretrained(folder)

    def logits(*ids):
        with torch.no_grad():
            inputs, decoder_inputs = (torch.tensor(one.astype(np.int64)) for one in ids)
            return model(input_ids=inputs, decoder_input_ids=decoder_inputs).logits.numpy()

    return logits


@pytest.mark.parity
@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_torch_t5_gives_torchs_logits(tmp_path, version):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        logits = save_torch_t5(tmp_path, version)
    # The folder holds what the published ones hold.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["feed_forward_proj"] == VERSIONS[version]["feed_forward_proj"]
    activations = {"v1.1": ("gelu", "linear"), "v1.0": ("relu",)}[version]
    t5 = dataclasses.replace(
        tiny.T5, mlp_activations=activations, tie_output=version == "v1.0", scan_layers=False
    )
    fid = dataclasses.replace(tiny.FID, t5=t5)
    params = parameters.load(tmp_path, GlimmerModel(fid), "sha256:any")
    batch = tiny.batch(passages=1, gold=False)
    batch = {name: np.where(x == 0, 2, x) for name, x in batch.items()}  # no padding
    got, _, _ = tiny.forward(fid)(params, batch)
    ids = np.concatenate([batch["question_tokens"], batch["passage_tokens"][:, 0]], axis=1)
    want = logits(ids, batch["decoder_input_tokens"])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.std(want) > 0.3
