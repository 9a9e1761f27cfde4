"""A job's program through XLA's TPU compiler, and what can be read from the result."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glimmer_jax.preflight import hlo
from glimmer_jax.preflight.flops import count_flops
from glimmer_jax.preflight.programs import Program
from glimmer_jax.preflight.report import Traffic

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NO_ROOM = re.compile(r"[Uu]sed ([0-9.]+)([KMGT]?) of [0-9.]+[KMGT]? hbm")
# Said early, where what is computed in between alone is too much.
_NO_ROOM_BETWEEN = re.compile(
    r"HLO temporaries \(([0-9.]+)([KMGT]?)\) exceeds available HBM \([0-9.]+[KMGT]?\)"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, compiled or refused."""

    bytes_per_device: dict[str, int]  # by kind, and `total`
    flops: int  # on all devices
    traffic: dict[str, Traffic]
    between_slices: int  # bytes that a device receives from other slices
    cycles: int  # that the compiler expects; 0 where it gives none
    why_not: str | None = None  # its words, where there was no room


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compiles for the mesh's devices; nothing runs."""
    given = program.bytes_by_kind()
    flops = flops_of(program, mesh)
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            why = no_room(str(error), sum(given.values()))
            if why is None:
                raise
            used, words = why
            found = {**given, "activations": max(used - sum(given.values()), 0), "total": used}
            return Compiled(found, flops, {}, 0, 0, words)
    memory = compiled.memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Arguments are padded; and those that the program does not look at lie on the device all the same.
    padding = max(memory.argument_size_in_bytes - sum(given.values()), 0)
    made = memory.temp_size_in_bytes + returned + memory.generated_code_size_in_bytes + padding
    text = compiled.as_text()
    return Compiled(
        {**given, "activations": made, "total": sum(given.values()) + made},
        flops,
        *traffic(text, mesh),
        hlo.estimated_cycles(text),
    )


def after_lookup(lookup: Compiled, step: Compiled, memory: int) -> Compiled:
    """The step with the lookup that runs before it, as one: what both send, and the larger need.

    Args:
      memory: bytes on a device of what the lookup finds, which is a part of the step's batch.
    """
    kinds = dict(step.bytes_per_device)
    table = kinds["memory_table"] = lookup.bytes_per_device["memory_table"]
    more = lookup.bytes_per_device["activations"] - memory - kinds["activations"]
    if more > 0:
        kinds["activations"] += more
    kinds["total"] += table + max(more, 0)
    traffic = dict(step.traffic)
    # A step that was refused sends nothing that is known, and the lookup alone is not the step.
    for kind, one in lookup.traffic.items() if step.why_not is None else ():
        other = traffic.get(kind, Traffic(0, 0))
        traffic[kind] = Traffic(one.count + other.count, one.bytes + other.bytes)
    return dataclasses.replace(
        step,
        bytes_per_device=kinds,
        traffic=traffic,
        between_slices=step.between_slices + lookup.between_slices,
        cycles=step.cycles and step.cycles + lookup.cycles,
        why_not=step.why_not or lookup.why_not,
    )


def flops_of(program: Program, mesh: Mesh) -> int:
    """Floating-point operations of one step's matrix products, on all devices."""
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(program.function)(*program.arguments)
    return count_flops(jaxpr, program.while_trips)


def no_room(message: str, given: int) -> tuple[int, str] | None:
    """Bytes that a program would need, and the compiler's words; None for any other error.

    Args:
      given: bytes of the arguments, which some messages leave out.
    """
    for words, besides in ((_NO_ROOM, 0), (_NO_ROOM_BETWEEN, given)):
        if (found := words.search(message)) is not None:
            used, unit = found.groups()
            return round(float(used) * _UNITS[unit]) + besides, found.group(0)
    return None


def traffic(text: str, mesh: Mesh) -> tuple[dict[str, Traffic], int]:
    """Collectives of a program by kind, and the bytes of those that span slices.

    What hosts carry between slices is a kind of its own, `through-hosts`.
    """
    index: Any = np.indices(mesh.devices.shape).reshape(len(mesh.axis_names), -1)
    slices = index[mesh.axis_names.index("slice")]
    totals: dict[str, list[int]] = {}
    between = 0
    for one in hlo.collectives(text):
        moved = one.moved(mesh.size)
        count, size = totals.get(one.kind, (0, 0))
        totals[one.kind] = [count + one.times, size + moved]
        between += moved if one.joins(slices) else 0
    carried, size = hlo.from_other_slices(text)
    if carried:
        totals["through-hosts"] = [carried, size]
        between += size
    return {kind: Traffic(*both) for kind, both in sorted(totals.items())}, between
