"""From T5's decoder to FiDO's (arXiv 2212.08153): fewer key and value heads, sparser cross-attention.

Heads are merged by their mean, as grouped-query attention was made from multi-head weights (arXiv
2305.13245, section 2.1); the cross-attention of layers that no longer attend is left out. Both change
what the model computes: such parameters are a start for training, not a copy.
"""

from typing import Any

import jax
import numpy as np

from glimmer_jax.models.stacking import stack_layers, unstack_layers
from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]
CROSS = ("encoder_decoder_attention", "pre_cross_attention_layer_norm")


def convert_decoder(decoder: Params, source: T5Config, target: T5Config) -> Params:
    """The decoder's parameters for `target`, which has fewer heads or attends less often.

    Args:
      decoder: unboxed, scanned or looped as `source` says.
      source: the setting they belong to.
      target: the setting wanted.

    Returns:
      Parameters for `target`, scanned or looped as it says.

    Raises:
      ValueError: heads or layers would have to be made up: more key heads than there are, a layer that
        attends and did not, other widths.
    """
    a, b = source.decoder_sizes, target.decoder_sizes
    if (a.num_heads, a.head_dim, a.mlp_dim) != (b.num_heads, b.head_dim, b.mlp_dim) or (
        source.num_decoder_layers != target.num_decoder_layers
    ):
        raise ValueError(
            f"A decoder of {source.num_decoder_layers} layers with {a} cannot become one of "
            f"{target.num_decoder_layers} with {b}: only key heads and the period may change. Train "
            "such a decoder from a start of its own."
        )
    if a.num_kv_heads % b.num_kv_heads or target.cross_attention_period % (
        source.cross_attention_period
    ):
        raise ValueError(
            f"{a.num_kv_heads} key heads and a period of {source.cross_attention_period} cannot "
            f"become {b.num_kv_heads} and {target.cross_attention_period}: heads are merged and "
            "layers left out, never made up. Choose a divisor of the heads and a multiple of the "
            "period."
        )
    out = unstack_layers(decoder) if source.scan_layers else dict(decoder)
    for i in range(target.num_decoder_layers):
        left_out = () if target.attends(i) else CROSS
        layer = {k: v for k, v in out[f"layers_{i}"].items() if k not in left_out}
        for name in ("self_attention", "encoder_decoder_attention"):
            if name in layer:
                layer[name] = _merge_heads(layer[name], a.num_kv_heads, b.num_kv_heads)
        out[f"layers_{i}"] = layer
    return stack_layers(out) if target.scan_layers else out


def _merge_heads(attention: Params, before: int, after: int) -> Params:
    def merge(kernel: Any) -> Any:
        if not isinstance(kernel, jax.Array):
            kernel = np.asarray(kernel)  # in a file: one kernel at a time is read
        shape = (kernel.shape[0], after, before // after, kernel.shape[1] // before)
        return kernel.reshape(shape).mean(2).reshape(kernel.shape[0], -1)

    if before == after:
        return attention
    merged = {name: {"kernel": merge(attention[name]["kernel"])} for name in ("key", "value")}
    return {**attention, **merged}
