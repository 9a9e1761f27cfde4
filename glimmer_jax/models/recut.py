"""From one cut of the encoder to another: the same layers, told apart elsewhere.

FiD, LUMEN and GLIMMER are one encoder, so one set of parameters starts any of them. `recut` is a
pure function on parameter trees. What would change the function that the parameters compute is
refused: a layer cannot move to a stack with another position table, and two copies that have been
trained apart cannot become one.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from glimmer_jax.models.fido import convert_decoder
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.stacking import stack_layers, unstack_layers

Params = dict[str, Any]

# T5 settings that change neither the parameters nor, beyond rounding, what they compute.
NUMERICS = ("dropout_rate", "dtype", "matmul_dtype", "remat_policy", "attention")
# Settings of the family that decide which parameters there are and what they are called.
STRUCTURE = (
    "memory_layers",
    "rerank_layers",
    "freeze_memory",
    "share_question_encoder",
    "share_position_table",
    "separate_reranker",
)


def recut(params: Params, source: GlimmerConfig, target: GlimmerConfig) -> Params:
    """Parameters of `source` rearranged for `target`.

    Args:
      params: unboxed parameters, scanned or looped as `source` says.
      source: the setting they belong to.
      target: the setting wanted; its T5 must have the sizes of the source's, but for a decoder with
        fewer key heads or sparser cross-attention, which is made from the source's (`fido`).

    Returns:
      Parameters for `target`, scanned or looped as it says. A score head that the source lacks
      starts fresh, at zero; one that it has is kept, as a start, even where other layers will feed
      it. The very same tree where the two settings have the same parameters.

    Raises:
      ValueError: the sizes differ; layers would have to change position table although the two
        tables differ; or copies that are no longer equal would have to be merged.
    """
    _check_sizes(source, target)
    params = _with_codebooks(params, source, target)
    same_layout = source.t5.scan_layers == target.t5.scan_layers
    same_layout &= _decoder(source) == _decoder(target)
    if same_layout and all(getattr(source, x) == getattr(target, x) for x in STRUCTURE):
        return params
    params = unstack_layers(params)
    if _decoder(source) != _decoder(target):
        looped = [dataclasses.replace(c.t5, scan_layers=False) for c in (source, target)]
        params["decoder"] = convert_decoder(params["decoder"], *looped)
    m, cut = source.memory_layers, source.memory_layers + source.rerank_layers
    live = params["live_encoder"]
    memory = params.get("memory_encoder", {})
    stacks = [_layers(memory), _layers(live.get("live_a", {})), _layers(live.get("live_b", {}))]
    wanted = [m, source.rerank_layers, source.t5.num_encoder_layers - cut]
    if [len(stack) for stack in stacks] != wanted:
        raise ValueError(
            f"The source has {wanted} layers in memory, Live-A and Live-B, and the parameters have "
            f"{[len(stack) for stack in stacks]}. Give the configuration they were trained with."
        )
    encoder = [layer for stack in stacks for layer in stack]

    # Position tables: those of the source, or copies of the only one it has.
    live_table = live["relpos_bias"]
    memory_table = memory.get("relpos_bias", live_table)
    one_table = target.share_position_table and m
    if (target.memory_layers != m or one_table) and not _equal(memory_table, live_table):
        raise ValueError(
            f"The cut cannot move from memory_layers={m} to {target.memory_layers}, nor can its two "
            "position tables become one: those of memory and live encoder have been trained apart, "
            "and a layer would change its table. Recut before training, or keep memory_layers."
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
    """Without codebooks where the target has none; with those it needs, or ValueError."""
    if not target.has_codebooks:
        if "memory_codebooks" not in params:
            return params
        return {name: part for name, part in params.items() if name != "memory_codebooks"}
    same = all(getattr(source, x) == getattr(target, x) for x in ("memory_codec", "memory_layers"))
    if not source.has_codebooks or not same:
        raise ValueError(
            f"MEMORY_CODEC={target.memory_codec!r} reads codebooks learnt from the states after layer "
            f"{target.memory_layers}, and these parameters have {_codebooks_of(source)}. Learn them "
            "with --run_mode=codebooks, and give the file that it writes."
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
                f"Parameters of a T5 with {name}={a} cannot become one with {name}={b}; a recut "
                "moves layers, it does not change their sizes."
            )


def _place_copies(out: Params, params: Params, source: GlimmerConfig, target: GlimmerConfig):
    """The question encoder and the frozen embedding, which may or may not be copies."""
    question = params.get("question_encoder")
    if target.share_question_encoder:
        if question is not None and not _equal(question, params["memory_encoder"]):
            raise ValueError(
                "The question encoder has been trained apart from the memory encoder and cannot be "
                "merged with it; set share_question_encoder=False."
            )
    elif question is not None and target.memory_layers == source.memory_layers:
        out["question_encoder"] = question
    elif question is not None and not _equal(question, params["memory_encoder"]):
        raise ValueError(
            f"The cut cannot move from memory_layers={source.memory_layers} to "
            f"{target.memory_layers}: question and memory encoder have been trained apart, and "
            "share the live layers that would be divided between them."
        )
    else:
        out["question_encoder"] = out["memory_encoder"]

    frozen = params.get("memory_embedder")
    if target.freeze_memory:
        out["memory_embedder"] = params["token_embedder"] if frozen is None else frozen
    elif frozen is not None and not _equal(frozen, params["token_embedder"]):
        raise ValueError(
            "The embedding has been trained apart from the frozen memory's embedding, and the two "
            "cannot be merged; set freeze_memory=True."
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
