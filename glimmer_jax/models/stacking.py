"""Unrolled layers (`layers_0`, `layers_1`, ...) and stacked layers (`layers`, a leading axis).

A scanned stack holds one set of parameters with a layer axis. If only every p-th layer has
cross-attention, blocks of p layers are stacked, `layers/block_0` to `layers/block_{p-1}`; p follows
from the parameter trees of the layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

Params = dict[str, Any]


def stack_layers(tree: Params) -> Params:
    """Unrolled parameters, at any depth of a tree -> the layout of a scanned model.

    numpy arrays stay numpy arrays. TensorStores are stacked without reading them.
    """
    out = {k: stack_layers(v) if isinstance(v, dict) else v for k, v in tree.items()}
    numbered = [f"layers_{i}" for i in range(len(out)) if f"layers_{i}" in out]
    if numbered:
        layers = [out.pop(name) for name in numbered]
        period = _period(layers)
        if period > 1:
            starts = range(0, len(layers), period)
            layers = [{f"block_{j}": layers[i + j] for j in range(period)} for i in starts]
        out["layers"] = jax.tree.map(_stack, *layers)
    return out


def unstack_layers(tree: Params) -> Params:
    """The inverse of `stack_layers`."""
    out = {k: unstack_layers(v) if isinstance(v, dict) else v for k, v in tree.items()}
    if "layers" in out:
        stacked = out.pop("layers")
        period = sum(name.startswith("block_") for name in stacked) or 1
        for i in range(jax.tree.leaves(stacked)[0].shape[0]):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            for j in range(period):
                out[f"layers_{i * period + j}"] = block[f"block_{j}"] if period > 1 else block
    return out


def _period(layers: list[Params]) -> int:
    kinds: list[Any] = [jax.tree.structure(layer) for layer in layers]
    for period in range(1, len(kinds) + 1):
        if len(kinds) % period == 0 and all(k == kinds[i % period] for i, k in enumerate(kinds)):
            return period
    raise AssertionError("the number of layers is always a period")


def _stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], ts.TensorStore):
        return ts.stack(leaves)
    # jnp would copy host arrays to the first device.
    return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
