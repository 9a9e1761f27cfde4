"""Hugging Face's PyTorch T5, v1.1 or 1.0, with the parameters of our tiny FiD."""

import warnings

import numpy as np
import pytest

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.stacking import unstack_layers
from tests.models import tiny


def torch_state(params, config: GlimmerConfig):
    """Our parameters under PyTorch's names; its linear layers hold kernels transposed."""
    looped = unstack_layers(params)
    embedders = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    out = {f"{name}.weight": params["token_embedder"]["embedding"] for name in embedders}
    if config.t5.tie_output:
        out["lm_head.weight"] = params["token_embedder"]["embedding"]
    else:
        out["lm_head.weight"] = params["decoder"]["logits_dense"]["kernel"].T

    def attention(name, tree):
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            out[f"{name}.{theirs}.weight"] = tree[ours]["kernel"].T

    def stack(name, layers, relpos_bias, norm, cross):
        table = "layer.0.SelfAttention.relative_attention_bias.weight"
        out[f"{name}.block.0.{table}"] = relpos_bias["rel_embedding"].T
        out[f"{name}.final_layer_norm.weight"] = norm["scale"]
        for i, layer in enumerate(layers):
            block = f"{name}.block.{i}.layer"
            parts = [("attention", "SelfAttention", "pre_attention_layer_norm")]
            if cross:
                parts = [("self_attention", "SelfAttention", "pre_self_attention_layer_norm")]
                cross_norm = "pre_cross_attention_layer_norm"
                parts.append(("encoder_decoder_attention", "EncDecAttention", cross_norm))
            for j, (ours, theirs, norm_name) in enumerate(parts):
                attention(f"{block}.{j}.{theirs}", layer[ours])
                out[f"{block}.{j}.layer_norm.weight"] = layer[norm_name]["scale"]
            j = len(parts)
            out[f"{block}.{j}.layer_norm.weight"] = layer["pre_mlp_layer_norm"]["scale"]
            for projection, tree in layer["mlp"].items():
                out[f"{block}.{j}.DenseReluDense.{projection}.weight"] = tree["kernel"].T

    live, decoder = looped["live_encoder"], looped["decoder"]
    encoder_layers = [live["live_b"][f"layers_{i}"] for i in range(config.t5.num_encoder_layers)]
    stack("encoder", encoder_layers, live["relpos_bias"], live["encoder_norm"], cross=False)
    decoder_layers = [decoder[f"layers_{i}"] for i in range(config.t5.num_decoder_layers)]
    stack("decoder", decoder_layers, decoder["relpos_bias"], decoder["decoder_norm"], cross=True)
    return out


def settings(t5, **more):
    """transformers' `T5Config` of our sizes, written apart from what reads and writes their files."""
    transformers = pytest.importorskip("transformers")
    return transformers.T5Config(
        vocab_size=t5.vocab_size,
        d_model=t5.emb_dim,
        d_kv=t5.head_dim,
        d_ff=t5.mlp_dim,
        num_layers=t5.num_encoder_layers,
        num_decoder_layers=t5.num_decoder_layers,
        num_heads=t5.num_heads,
        decoder_start_token_id=0,
        **more,
    )


def build(params, config: GlimmerConfig = tiny.FID):
    """(torch, the model with the parameters of `config`); skips where there is no PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        t5 = config.t5
        feed_forward = {("gelu", "linear"): "gated-gelu", ("relu",): "relu"}[t5.mlp_activations]
        theirs = settings(t5, feed_forward_proj=feed_forward, tie_word_embeddings=t5.tie_output)
        model = transformers.T5ForConditionalGeneration(theirs).eval()
    if not t5.tie_output:
        # transformers 5 ties the output layer to the embedding until a checkpoint says otherwise.
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(t5.vocab_size, t5.emb_dim))
    state = {k: torch.tensor(np.array(v)) for k, v in torch_state(params, config).items()}
    model.load_state_dict(state, strict=True)
    return torch, model
