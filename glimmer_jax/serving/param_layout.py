"""The layout of parameters that answers questions fastest; results do not change.

* Layers are unrolled. Then the last reranking layer can skip the passages that are not kept
  (`Glimmer.choose`), and layers of a sparse decoder can skip cross-attention.
* Values that a matrix product rounds are rounded once, here, not for each question or token.
* On a CPU, passages are read a few at a time, so that their states stay in its caches.
* On a CPU, kernels that multiply a single token are stored by rows (`Dense.rows`). A product with
  one row is bound by reading its kernel, and XLA reads bfloat16 kernels three to ten times slower.
"""

import dataclasses
from typing import Any

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.stacking import unstack_layers
from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]

# Passages of 256 tokens: 2 to 10 at a time take equally long, 40 a sixth longer.
CPU_CHUNK = 5


def unrolled(model: GlimmerModel, platform: str) -> GlimmerModel:
    """The same model with unrolled layers; `platform` is JAX's name of the kind of device."""
    config = model.config
    chunk = config.read_chunk
    if chunk is None and platform == "cpu":
        chunk = CPU_CHUNK
    config = dataclasses.replace(config.with_t5(scan_layers=False), read_chunk=chunk)
    return model.with_config(config)


def unstack(model: GlimmerModel, params: Params) -> Params:
    """Parameters of `model` with unrolled layers; leaves may be TensorStores."""
    return unstack_layers(params) if model.config.t5.scan_layers else params


def lay_out(model: GlimmerModel, params: Params, rows: int, platform: str) -> Params:
    """Rounds and transposes placed parameters for the matrix products of `model`.

    Args:
      model: from `unrolled`.
      params: its parameters, JAX arrays in dicts. The dicts are emptied: each array is released as
        soon as its successor exists, so that two copies of all parameters never coexist.
      rows: tokens per decoding step, which is questions times beams.
      platform: JAX's name of the kind of device.
    """
    t5 = model.config.t5
    # With more than one row a product is bound by computing, and columns are faster.
    by_rows = rows == 1 and t5.operands is not None and platform == "cpu"
    return _lay_out(params, t5, by_rows, ())


def _lay_out(params: Params, t5: T5Config, by_rows: bool, path: tuple[str, ...]) -> Params:
    out: Params = {}
    for name in list(params):
        leaf = params.pop(name)
        if isinstance(leaf, dict):
            out[name] = _lay_out(leaf, t5, by_rows, (*path, name))
        elif name == "kernel" and leaf.ndim == 2:
            kernel = leaf.astype(t5.kernel_dtype(path[-1]))
            one_token = path[0] == "decoder" and not _of_passages(path)
            out |= {"rows": kernel.T} if by_rows and one_token else {"kernel": kernel}
        elif name == "embedding" and not t5.tie_output:
            out[name] = leaf.astype(t5.dtype)
        else:
            out[name] = leaf
    return out


def _of_passages(path: tuple[str, ...]) -> bool:
    """Whether a kernel computes keys and values of passages: many rows, before the first token."""
    return path[-1] in ("key", "value") and "encoder_decoder_attention" in path
