"""Matrix products of a program, counted in its jaxpr.

The compiler's own count takes the body of a loop once, however often it runs; a jaxpr names the
number of layers of a scan.
"""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def count_flops(jaxpr: Any, while_trips: int = 1) -> int:
    """Floating-point operations of all matrix products, on all devices together; 2 a multiply-add.

    Args:
      jaxpr: from `jax.make_jaxpr`.
      while_trips: how often a loop runs whose length the program decides: decoding, once a token.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0
    for equation in inner.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
            continue
        counts = [count_flops(part, while_trips) for part in _parts(params)]
        if name == "scan":
            total += params["length"] * sum(counts)
        elif name == "while":
            total += while_trips * sum(counts)
        elif name == "cond":
            total += max(counts, default=0)
        elif name == "shard_map":
            total += params["mesh"].size * sum(counts)
        else:
            total += sum(counts)
    return total


def _parts(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [one for one in values if isinstance(one, (ClosedJaxpr, Jaxpr))]
    return found
