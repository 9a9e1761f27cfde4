"""Hugging Face's names and settings of a T5, and ours.

Their linear layers hold kernels transposed, their position tables are `[buckets, heads]`, and what
is one layer with us is a list of sub-layers. `config.json` says the rest. A divided encoder has their
names too: its layers are numbered through, and each part that has a position table has it in its first
block. The whole table is in docs/weights.md.
"""

import re
from collections.abc import Mapping
from typing import Any

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config

# Theirs -> ours. Their plain "gelu" is the exact one, which no T5 was trained with.
ACTIVATIONS = {
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "relu": ("relu",),
    "gelu_new": ("gelu",),
}
# Copies of the embedding, and a table of which old files hold random numbers that nothing reads.
IGNORED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
OUTPUT, EMBEDDING = "lm_head.weight", "shared.weight"
# What is not part of a stack.
_ALONE = {
    "token_embedder/embedding": EMBEDDING,
    "memory_embedder/embedding": "memory_shared.weight",
    **{
        f"memory_codebooks/{name}": f"memory_codebooks.{name}"
        for name in ("centroids", "basis", "scale", "mean")
    },
    "decoder/logits_dense/kernel": OUTPUT,
    "reranker/norm/scale": "reranker.final_layer_norm.weight",
    "reranker/kernel": "reranker.kernel",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"
# Sub-layer of a block: (number in the encoder, number in the decoder, their name).
_PARTS = {
    "attention": (0, None, "SelfAttention"),
    "self_attention": (None, 0, "SelfAttention"),
    "encoder_decoder_attention": (None, 1, "EncDecAttention"),
    "mlp": (1, 2, "DenseReluDense"),
    "pre_attention_layer_norm": (0, None, "layer_norm"),
    "pre_self_attention_layer_norm": (None, 0, "layer_norm"),
    "pre_cross_attention_layer_norm": (None, 1, "layer_norm"),
    "pre_mlp_layer_norm": (1, 2, "layer_norm"),
}


def their_name(name: str, config: GlimmerConfig) -> str:
    """`encoder/layers_3/attention/query/kernel` -> `encoder.block.3.layer.0.SelfAttention.q.weight`.

    Args:
      name: one of `t5_names.shapes`.
      config: says at which layer a part of a divided encoder begins.
    """
    if name in _ALONE:
        return _ALONE[name]
    stack, first, rest = _stack(name, config)
    if rest == "relpos_bias/rel_embedding":
        return f"{stack}.block.{first}.{_TABLE}"
    if rest.endswith("_norm/scale") and "/" not in rest.removesuffix("/scale"):
        return f"{stack}.final_layer_norm.weight"
    layer, part, *more = rest.split("/")
    in_encoder, in_decoder, theirs = _PARTS[part]
    number = in_decoder if stack == "decoder" else in_encoder
    middle = "".join(f".{_PROJECTIONS.get(one, one)}" for one in more[:-1])
    block = first + int(layer.removeprefix("layers_"))
    return f"{stack}.block.{block}.layer.{number}.{theirs}{middle}.weight"


def _stack(name: str, config: GlimmerConfig) -> tuple[str, int, str]:
    """(their stack, number of its first block, name within it)."""
    memory, cut = config.memory_layers, config.memory_layers + config.rerank_layers
    for ours, theirs, first in (
        ("memory_encoder/", "encoder", 0),
        ("live_encoder/live_a/", "encoder", memory),
        ("live_encoder/live_b/", "encoder", cut),
        # The table that all layers share is where a T5 has it.
        ("live_encoder/", "encoder", 0 if config.share_position_table else memory),
        ("reranker/stack/", "reranker", 0),
    ):
        if name.startswith(ours):
            return theirs, first, name.removeprefix(ours)
    stack, rest = name.split("/", 1)
    return stack, 0, rest


def transposed(name: str) -> bool:
    """Whether our parameter of this name is the transpose of theirs."""
    return name.endswith(("/kernel", "/rel_embedding")) and name != "reranker/kernel"


def read_config(path: Any, config: Mapping[str, Any], tie_output: bool) -> T5Config:
    """Our sizes from their `config.json`.

    Args:
      path: of the folder, for messages.
      config: the JSON.
      tie_output: whether the output layer is the embedding.

    Raises:
      ValueError: another architecture, or settings that our layers do not have.
    """
    if config.get("model_type") not in ("t5", "mt5"):
        raise ValueError(
            f"{path} holds a model of type {config.get('model_type')!r}; only 't5' and 'mt5' are read."
        )
    activation = config.get("feed_forward_proj", "relu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{path} has feed_forward_proj {activation!r}; known are {', '.join(ACTIVATIONS)}."
        )
    if config.get("layer_norm_epsilon", 1e-6) != 1e-6:
        raise ValueError(
            f"{path} has layer_norm_epsilon {config['layer_norm_epsilon']}, and our norms have 1e-6."
        )
    return T5Config(
        vocab_size=config["vocab_size"],
        emb_dim=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        mlp_activations=ACTIVATIONS[activation],
        relpos_buckets=config.get("relative_attention_num_buckets", 32),
        relpos_max_distance=config.get("relative_attention_max_distance", 128),
        scan_layers=False,
        tie_output=tie_output,
    )


def scales_output(config: Mapping[str, Any]) -> bool:
    """Whether logits are scaled by D^-0.5: T5 1.0's way, which goes with a tied output layer."""
    return config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)


def write_config(t5: T5Config) -> dict[str, Any]:
    """The inverse of `read_config`.

    Raises:
      ValueError: activations that T5 of Hugging Face does not have.
    """
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(t5.mlp_activations)
    if activation is None:
        raise ValueError(
            f"Hugging Face's T5 has no feed-forward with mlp_activations={t5.mlp_activations}; known "
            f"are {list(ACTIVATIONS.values())}."
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": t5.vocab_size,
        "d_model": t5.emb_dim,
        "num_heads": t5.num_heads,
        "d_kv": t5.head_dim,
        "d_ff": t5.mlp_dim,
        "num_layers": t5.num_encoder_layers,
        "num_decoder_layers": t5.num_decoder_layers,
        "feed_forward_proj": activation,
        "relative_attention_num_buckets": t5.relpos_buckets,
        "relative_attention_max_distance": t5.relpos_max_distance,
        "tie_word_embeddings": t5.tie_output,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": t5.dropout_rate,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }


def torch_name(path: tuple[str, ...]) -> str:
    """A path of a Flax file -> the name that the same parameter has in PyTorch's."""
    return re.sub(r"\.(kernel|embedding)$", ".weight", ".".join(path))
