"""From T5's decoder to FiDO's (arXiv 2212.08153): fewer key and value heads, sparser cross-attention.

Heads are merged by their mean, as in the conversion to grouped-query attention (arXiv 2305.13245,
section 2.1). Layers that no longer attend lose their cross-attention. Both change the function that
the model computes: the result is an initialisation, not a copy.
"""

from typing import Any

import jax
import numpy as np

from glimmer_jax.models.stacking import stack_layers, unstack_layers
from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]
CROSS = ("encoder_decoder_attention", "pre_cross_attention_layer_norm")


def convert_decoder(decoder: Params, source: T5Config, target: T5Config) -> Params:
    """Decoder parameters for `target`, which has fewer key heads or attends less often.

    Args:
      decoder: unboxed parameters, in the layout (`scan_layers`) of `source`.
      source: the configuration of `decoder`.
      target: the configuration of the result.

    Returns:
      Parameters in the layout of `target`.

    Raises:
      ValueError: `target` needs parameters that `source` lacks: more key heads, cross-attention in
        more layers, other widths.
    """
    a, b = source.decoder_sizes, target.decoder_sizes
    if (a.num_heads, a.head_dim, a.mlp_dim) != (b.num_heads, b.head_dim, b.mlp_dim) or (
        source.num_decoder_layers != target.num_decoder_layers
    ):
        raise ValueError(
            f"A decoder of {source.num_decoder_layers} layers with {a} cannot be converted to "
            f"{target.num_decoder_layers} layers with {b}: only decoder_kv_heads and "
            "cross_attention_period may change. Train such a decoder from scratch."
        )
    if a.num_kv_heads % b.num_kv_heads or target.cross_attention_period % (
        source.cross_attention_period
    ):
        raise ValueError(
            f"decoder_kv_heads={b.num_kv_heads} and cross_attention_period="
            f"{target.cross_attention_period} must be a divisor and a multiple of the source's "
            f"{a.num_kv_heads} and {source.cross_attention_period}."
        )
    out = unstack_layers(decoder) if source.scan_layers else dict(decoder)
    for i in range(target.num_decoder_layers):
        removed = () if target.attends(i) else CROSS
        layer = {k: v for k, v in out[f"layers_{i}"].items() if k not in removed}
        for name in ("self_attention", "encoder_decoder_attention"):
            if name in layer:
                layer[name] = _merge_heads(layer[name], a.num_kv_heads, b.num_kv_heads)
        out[f"layers_{i}"] = layer
    return stack_layers(out) if target.scan_layers else out


def _merge_heads(attention: Params, before: int, after: int) -> Params:
    def merge(kernel: Any) -> Any:
        if not isinstance(kernel, jax.Array):
            kernel = np.asarray(kernel)  # reads one lazy array at a time
        shape = (kernel.shape[0], after, before // after, kernel.shape[1] // before)
        return kernel.reshape(shape).mean(2).reshape(kernel.shape[0], -1)

    if before == after:
        return attention
    merged = {name: {"kernel": merge(attention[name]["kernel"])} for name in ("key", "value")}
    return {**attention, **merged}
