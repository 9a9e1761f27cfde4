"""FLOPs of a JAX program, counted from its trace: two for each multiply-add of a matrix product.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trips; here a scan counts as
often as it runs, and the loop over answer tokens as often as it is told to.
"""

import math
from typing import Any

import jax
import jax.extend.core


def count(jaxpr: Any, tokens: int) -> int:
    """FLOPs of a (closed) jaxpr, in which every `while` runs `tokens` times."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        times = {"scan": eqn.params.get("length"), "while": tokens}.get(name, 1)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += times * count(inner, tokens)
    return total
