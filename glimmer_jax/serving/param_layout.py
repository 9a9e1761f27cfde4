"""Parameters as questions are answered fastest with them; what is computed stays the same.

* Layers stand one by one: what is needed of the last reranking layer for the kept passages alone
  (`Glimmer.choose`) and of a decoder that attends now and then, is then computed and nothing more.
* Numbers that a product rounds are rounded once, here, and not for each question or token.
* On a CPU passages are read a few at a time, whose states stay in its caches.
* On a CPU the kernels that one token multiplies lie row by row: `Dense.rows`. A product with one row
  is bound by reading them, and there XLA reads bfloat16 kernels three to ten times slower.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.stacking import unstack_layers
from glimmer_jax.models.t5 import T5Config

Params = dict[str, Any]

# Whole passages of 256 tokens: 2 to 10 at a time are alike, all 40 of a question a sixth slower.
CPU_CHUNK = 5


def unrolled(model: GlimmerModel, platform: str) -> GlimmerModel:
    """The same model with its layers one by one; `platform` is JAX's name for the devices' kind."""
    config = model.config
    chunk = config.read_chunk
    if chunk is None and platform == "cpu":
        chunk = CPU_CHUNK
    t5 = dataclasses.replace(config.t5, scan_layers=False)
    unrolled_config = dataclasses.replace(config, t5=t5, read_chunk=chunk)
    return GlimmerModel(unrolled_config, model.loss, model.decode, eos_id=model.eos_id)


def unstack(model: GlimmerModel, params: Params) -> Params:
    """Parameters of `model`, which may lie in files, as `unrolled` reads them."""
    return unstack_layers(params) if model.config.t5.scan_layers else params


def lay_out(model: GlimmerModel, params: Params, rows: int, platform: str) -> Params:
    """Parameters that have been placed, as `model`, unrolled, multiplies them.

    Args:
      model: from `unrolled`.
      params: its parameters, JAX arrays in dicts, which are emptied: each array is let go when its
        successor is there, so that no second copy of all is held.
      rows: tokens that a step of decoding multiplies: questions times beams.
      platform: JAX's name for the devices' kind.
    """
    t5 = model.config.t5
    # With more than one row a product is bound by computing, and kernels are better.
    by_rows = rows == 1 and t5.operands is not None and platform == "cpu"
    return _lay_out(params, t5, by_rows, ())


def _lay_out(params: Params, t5: T5Config, by_rows: bool, path: tuple[str, ...]) -> Params:
    out: Params = {}
    for name in list(params):
        leaf = params.pop(name)
        if isinstance(leaf, dict):
            out[name] = _lay_out(leaf, t5, by_rows, (*path, name))
        elif name == "kernel" and leaf.ndim == 2:
            kernel = leaf.astype(_multiplied(t5, path))
            one_token = path[0] == "decoder" and not _of_passages(path)
            out |= {"rows": kernel.T} if by_rows and one_token else {"kernel": kernel}
        elif name == "embedding" and not t5.tie_output:
            out[name] = leaf.astype(t5.dtype)
        else:
            out[name] = leaf
    return out


def _multiplied(t5: T5Config, path: tuple[str, ...]) -> Any:
    """The dtype that the product at `path` rounds its kernel to."""
    if t5.operands is not None:
        return t5.operands
    return jnp.float32 if path[-1] == "logits_dense" else jnp.dtype(t5.dtype)


def _of_passages(path: tuple[str, ...]) -> bool:
    """Keys and values of passages: many rows at once, before the first token."""
    return path[-1] in ("key", "value") and "encoder_decoder_attention" in path
