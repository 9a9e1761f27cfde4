"""Hugging Face's names and settings of a T5, and ours.

Their linear layers hold transposed kernels, their position tables are `[buckets, heads]`, and their
layers are lists of sub-layers. Settings are in `config.json`. A divided encoder uses their names too:
its layers are numbered consecutively, and each part with a position table has it in its first block.
docs/weights.md lists all names.
"""

import re
from collections.abc import Mapping
from typing import Any

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.weights.file_errors import InvalidWeights
from glimmer_jax.weights.model_config import build_t5

# Theirs -> ours. Their plain "gelu" is the exact GELU, which no T5 was trained with.
ACTIVATIONS = {
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "relu": ("relu",),
    "gelu_new": ("gelu",),
}
OUTPUT, EMBEDDING = "lm_head.weight", "shared.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A table of random numbers in old files, which no implementation reads.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
# Defaults of transformers' configurations, for settings that a `config.json` leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 32128,
        "d_model": 512,
        "num_heads": 8,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "feed_forward_proj": "relu",
    },
    "mt5": {
        "vocab_size": 250112,
        "d_model": 512,
        "num_heads": 6,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "feed_forward_proj": "gated-gelu",
    },
}
# Parameters outside the stacks.
_ALONE = {
    "token_embedder/embedding": EMBEDDING,
    "memory_embedder/embedding": "memory_shared.weight",
    **{
        f"memory_codebooks/{name}": f"memory_codebooks.{name}"
        for name in ("centroids", "frequencies", "basis", "scale", "mean")
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
      config: determines the first layer of each part of a divided encoder.
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
    middle = "".join(f".{_PROJECTIONS.get(key, key)}" for key in more[:-1])
    block = first + int(layer.removeprefix("layers_"))
    return f"{stack}.block.{block}.layer.{number}.{theirs}{middle}.weight"


def _stack(name: str, config: GlimmerConfig) -> tuple[str, int, str]:
    """(their stack, number of the part's first block, name within the part)."""
    memory, cut = config.memory_layers, config.memory_layers + config.rerank_layers
    for ours, theirs, first in (
        ("memory_encoder/", "encoder", 0),
        ("live_encoder/live_a/", "encoder", memory),
        ("live_encoder/live_b/", "encoder", cut),
        # A table that all layers share is in the first block, as in a T5.
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


def check_type(path: Any, config: Mapping[str, Any]) -> None:
    """Raises InvalidWeights if a `config.json` is not that of a T5."""
    if str(config.get("model_type")) not in _DEFAULTS:
        raise InvalidWeights(
            f"{path}/config.json has model_type {config.get('model_type')!r:.40}. Supported are "
            f"{', '.join(_DEFAULTS)}."
        )


def read_config(path: Any, config: Mapping[str, Any], tie_output: bool) -> T5Config:
    """Our sizes from their `config.json`.

    Args:
      path: of the folder, for messages.
      config: the JSON; settings that it leaves out have transformers' defaults.
      tie_output: whether the output layer is the embedding, with scaled logits.

    Raises:
      InvalidWeights: another architecture, or settings that our layers do not support.
    """
    check_type(path, config)
    defaults = _DEFAULTS[config["model_type"]]
    config = {**defaults, **{name: x for name, x in config.items() if x is not None}}
    activation = config["feed_forward_proj"]
    if str(activation) not in ACTIVATIONS:
        raise InvalidWeights(
            f"{path}/config.json has feed_forward_proj {activation!r:.40}. Supported are "
            f"{', '.join(ACTIVATIONS)}."
        )
    buckets = config.get("relative_attention_num_buckets", 32)
    function = "gelu_new" if activation == "gated-gelu" else activation.rpartition("-")[2]
    for name, expected in {
        "layer_norm_epsilon": 1e-6,
        "dense_act_fn": function,
        "is_gated_act": activation.startswith("gated-"),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }.items():
        if config.get(name, expected) != expected:
            raise InvalidWeights(
                f"{path}/config.json has {name} {config[name]!r:.40}. Only {expected!r} is supported."
            )
    t5 = build_t5(
        f"{path}/config.json",
        vocab_size=config["vocab_size"],
        emb_dim=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers", config["num_layers"]),
        mlp_activations=ACTIVATIONS[activation],
        relpos_buckets=buckets,
        relpos_max_distance=config.get("relative_attention_max_distance", 128),
        scan_layers=False,
        tie_output=tie_output,
    )
    if t5.relpos_max_distance < t5.relpos_buckets:
        raise InvalidWeights(
            f"{path}/config.json has relative_attention_max_distance {t5.relpos_max_distance}, below "
            f"relative_attention_num_buckets {buckets}. T5 divides distances into more buckets than "
            "there are distances. Correct one of them."
        )
    return t5


def scales_output(config: Mapping[str, Any]) -> bool:
    """Whether a tied output layer's logits are scaled by D^-0.5, as in T5 1.0.

    transformers 5 ties every T5 in `config.json` and records the scale apart. Its mT5 is never scaled;
    that of transformers 4 is, if `config.json` ties it.
    """
    tied = config.get("tie_word_embeddings")
    if config.get("model_type") == "mt5":
        major = str(config.get("transformers_version", "5")).partition(".")[0]
        return tied is True and major in ("3", "4")
    scaled = config.get("scale_decoder_outputs", tied is not False)
    return bool(scaled)


def write_config(t5: T5Config) -> dict[str, Any]:
    """The inverse of `read_config`.

    Raises:
      ValueError: Hugging Face's T5 does not have these activations.
    """
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(t5.mlp_activations)
    if activation is None:
        raise ValueError(
            f"mlp_activations={t5.mlp_activations} cannot be exported: Hugging Face's T5 has "
            f"{list(ACTIVATIONS.values())}. Export with OUTPUT_FORMAT='t5x'."
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
    """The name in a PyTorch file of the parameter at a path in a Flax file."""
    return re.sub(r"\.(kernel|embedding)$", ".weight", ".".join(path))
