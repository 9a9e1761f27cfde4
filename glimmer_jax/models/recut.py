"""Moves parameters between cuts of the encoder.

FiD, LUMEN and GLIMMER share one encoder, so that the same parameters initialise any of them. `recut`
is a pure function on parameter trees. It rejects changes of the function that the parameters
compute: a layer cannot move to a stack with a different position table, and copies that differ after
training cannot be merged.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from glimmer_jax.models.fido import convert_decoder
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.stacking import stack_layers, unstack_layers

Params = dict[str, Any]

# T5 settings that affect neither the parameters nor, up to rounding, the function they compute.
NUMERICS = ("dropout_rate", "dtype", "matmul_dtype", "remat_policy", "attention")
# Settings that determine the parameter tree.
STRUCTURE = (
    "memory_layers",
    "rerank_layers",
    "freeze_memory",
    "share_question_encoder",
    "share_position_table",
    "separate_reranker",
)


def recut(params: Params, source: GlimmerConfig, target: GlimmerConfig) -> Params:
    """Parameters of `source`, rearranged for `target`.

    Args:
      params: unboxed parameters, in the layout (`scan_layers`) of `source`.
      source: the configuration of `params`.
      target: the configuration of the result. Its T5 sizes must equal those of `source`, except for a
        decoder with fewer key heads or sparser cross-attention, which is converted (`fido`).

    Returns:
      Parameters in the layout of `target`. A missing score head is initialised to zero; an existing
      one is kept, even if other layers feed it in `target`. Returns `params` itself if both
      configurations have the same parameters.

    Raises:
      ValueError: the sizes differ; layers would have to move to a different position table; or
        copies that differ would have to be merged.
    """
    _check_sizes(source, target)
    params = _with_codebooks(params, source, target)
    same_layout = source.t5.scan_layers == target.t5.scan_layers
    same_layout &= _decoder(source) == _decoder(target)
    if same_layout and all(getattr(source, x) == getattr(target, x) for x in STRUCTURE):
        return params
    params = unstack_layers(params)
    if _decoder(source) != _decoder(target):
        unrolled = [dataclasses.replace(c.t5, scan_layers=False) for c in (source, target)]
        params["decoder"] = convert_decoder(params["decoder"], *unrolled)
    m, cut = source.memory_layers, source.memory_layers + source.rerank_layers
    live = params["live_encoder"]
    memory = params.get("memory_encoder", {})
    stacks = [_layers(memory), _layers(live.get("live_a", {})), _layers(live.get("live_b", {}))]
    expected = [m, source.rerank_layers, source.t5.num_encoder_layers - cut]
    if [len(stack) for stack in stacks] != expected:
        raise ValueError(
            f"The configuration has {expected} layers in memory, Live-A and Live-B, and the parameters "
            f"have {[len(stack) for stack in stacks]}. Use the configuration they were trained with."
        )
    encoder = [layer for stack in stacks for layer in stack]

    # Position tables of the source, or copies of its only one.
    live_table = live["relpos_bias"]
    memory_table = memory.get("relpos_bias", live_table)
    one_table = target.share_position_table and m
    if (target.memory_layers != m or one_table) and not _equal(memory_table, live_table):
        raise ValueError(
            f"memory_layers={m} cannot become {target.memory_layers}, and share_position_table cannot be "
            "set: the position tables of memory and live encoder differ, and layers would change "
            "table. Recut before training, or keep memory_layers and share_position_table."
        )

    def numbered(layers):
        return {f"layers_{i}": layer for i, layer in enumerate(layers)}

    kept = ("token_embedder", "decoder", "memory_codebooks")
    out: Params = {name: params[name] for name in kept if name in params}
    new_m, new_cut = target.memory_layers, target.memory_layers + target.rerank_layers
    if new_m:
        out["memory_encoder"] = numbered(encoder[:new_m])
        if not target.share_position_table:
            out["memory_encoder"]["relpos_bias"] = memory_table
    out["live_encoder"] = {"relpos_bias": live_table, "encoder_norm": live["encoder_norm"]}
    for name, layers in (("live_a", encoder[new_m:new_cut]), ("live_b", encoder[new_cut:])):
        if layers:
            out["live_encoder"][name] = numbered(layers)

    _place_copies(out, params, source, target)
    if target.rerank_layers:
        out["reranker"] = _reranker(params, source, target, encoder[new_m:new_cut])
    return stack_layers(out) if target.t5.scan_layers else out


def _with_codebooks(params: Params, source: GlimmerConfig, target: GlimmerConfig) -> Params:
    """`params` with the codebooks that `target` needs; raises if they are missing."""
    if not target.has_codebooks:
        if "memory_codebooks" not in params:
            return params
        return {name: part for name, part in params.items() if name != "memory_codebooks"}
    same = all(getattr(source, x) == getattr(target, x) for x in ("memory_codec", "memory_layers"))
    if not source.has_codebooks or not same:
        raise ValueError(
            f"MEMORY_CODEC={target.memory_codec!r} needs codebooks of the states after layer "
            f"{target.memory_layers}, and these parameters have {_codebooks_of(source)}. Learn them "
            "with --run_mode=codebooks, and use the checkpoint that it writes."
        )
    return params


def _codebooks_of(config: GlimmerConfig) -> str:
    if not config.has_codebooks:
        return "none"
    return f"those of {config.memory_codec!r} after layer {config.memory_layers}"


def _layers(stack: Params) -> list[Params]:
    return [stack[f"layers_{i}"] for i in range(sum(name.startswith("layers_") for name in stack))]


def _decoder(config: GlimmerConfig) -> tuple[Any, ...]:
    t5 = config.t5
    return t5.decoder_sizes, t5.num_decoder_layers, t5.cross_attention_period


def _check_sizes(source: GlimmerConfig, target: GlimmerConfig) -> None:
    for name in source.t5.__dataclass_fields__:
        a, b = getattr(source.t5, name), getattr(target.t5, name)
        of_decoder = (
            name.startswith(("decoder_", "num_decoder")) or name == "cross_attention_period"
        )
        if name not in (*NUMERICS, "scan_layers") and not of_decoder and a != b:
            raise ValueError(
                f"Parameters of a T5 with {name}={a} cannot be used with {name}={b}: a recut moves "
                "layers and keeps their sizes."
            )


def _place_copies(out: Params, params: Params, source: GlimmerConfig, target: GlimmerConfig):
    """Adds the question encoder and the frozen embedding, or merges them if they are equal."""
    question = params.get("question_encoder")
    if target.share_question_encoder:
        if question is not None and not _equal(question, params["memory_encoder"]):
            raise ValueError(
                "share_question_encoder=True: the question encoder differs from the memory encoder after "
                "training and cannot be merged. Set share_question_encoder=False."
            )
    elif question is not None and target.memory_layers == source.memory_layers:
        out["question_encoder"] = question
    elif question is not None and not _equal(question, params["memory_encoder"]):
        raise ValueError(
            f"memory_layers={source.memory_layers} cannot become {target.memory_layers}: question and "
            "memory encoder differ after training, and both use the layers that would move."
        )
    else:
        out["question_encoder"] = out["memory_encoder"]

    frozen = params.get("memory_embedder")
    if target.freeze_memory:
        out["memory_embedder"] = params["token_embedder"] if frozen is None else frozen
    elif frozen is not None and not _equal(frozen, params["token_embedder"]):
        raise ValueError(
            "freeze_memory=False: the embedding differs from the frozen memory's embedding after "
            "training and cannot be merged. Set freeze_memory=True."
        )


def _reranker(params: Params, source: GlimmerConfig, target: GlimmerConfig, live_a) -> Params:
    width = target.t5.emb_dim
    ones = np.ones((width,), np.float32)
    fresh = {"norm": {"scale": ones}, "kernel": ones}
    head = dict(params.get("reranker", fresh))
    own = head.pop("stack", None)
    if target.separate_reranker:
        same = source.separate_reranker and source.rerank_layers == target.rerank_layers
        layers = {f"layers_{i}": layer for i, layer in enumerate(live_a)}
        head["stack"] = own if same else layers
    return head


def _equal(a: Any, b: Any) -> bool:
    """Bit equality of two parameter trees."""
    same = jax.tree.map(lambda x, y: bool(np.array_equal(np.asarray(x), np.asarray(y))), a, b)
    return all(jax.tree.leaves(same))
