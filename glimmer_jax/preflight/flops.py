"""FLOPs of a program's matrix products, counted in its jaxpr.

The compiler's own count includes the body of a loop only once; a jaxpr holds the length of a scan
and the grid of a Pallas kernel.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Any, while_trips: int = 1) -> int:
    """Floating-point operations of all matrix products on all devices; 2 per multiply-add.

    Args:
      jaxpr: from `jax.make_jaxpr`.
      while_trips: iterations of loops without a static length: decoding, once per token.
    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0
    for equation in body.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
            continue
        counts = [count_flops(inner, while_trips) for inner in _inner_jaxprs(params)]
        if name == "scan":
            total += params["length"] * sum(counts)
        elif name == "while":
            total += while_trips * sum(counts)
        elif name == "cond":
            # For a choice by platform, count the default, which is last, since a TPU's branch pads.
            total += counts[-1] if params.get("branches_platforms") else max(counts)
        elif name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * sum(counts)
        elif name == "shard_map":
            total += params["mesh"].size * sum(counts)
        else:
            total += sum(counts)
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    jaxprs = []
    for value in params.values():
        values = value if isinstance(value, (tuple, list)) else (value,)
        jaxprs += [jaxpr for jaxpr in values if isinstance(jaxpr, (ClosedJaxpr, Jaxpr))]
    return jaxprs
