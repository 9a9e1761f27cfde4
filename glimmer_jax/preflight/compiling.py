"""Compiles a job's program with XLA's TPU compiler and reads bytes, traffic and cycles from it."""

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
# Reported early, if the temporaries alone exceed the memory.
_NO_ROOM_FOR_TEMPORARIES = re.compile(
    r"HLO temporaries \(([0-9.]+)([KMGT]?)\) exceeds available HBM \([0-9.]+[KMGT]?\)"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, compiled or rejected for lack of memory."""

    bytes_per_device: dict[str, int]  # by kind, and `total`
    flops: int  # on all devices
    traffic: dict[str, Traffic]
    between_slices: int  # bytes that a device receives from other slices
    memory_traffic: int  # bytes that a device at least reads from and writes to its memory
    cycles: int  # the compiler's estimate; 0 without one
    kernels: int  # executions of custom kernels, which have no estimate
    why_not: str | None = None  # the compiler's message if there is not enough memory


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compiles for the mesh's devices without running anything."""
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
            used, message = why
            kinds = {**given, "activations": max(used - sum(given.values()), 0), "total": used}
            return Compiled(kinds, flops, {}, 0, 0, 0, 0, message)
    memory = compiled.memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Arguments are padded. Unused arguments occupy memory as well.
    padding = max(memory.argument_size_in_bytes - sum(given.values()), 0)
    activations = memory.temp_size_in_bytes + returned + memory.generated_code_size_in_bytes
    activations += padding
    text = compiled.as_text()
    once = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Compiled(
        {**given, "activations": activations, "total": sum(given.values()) + activations},
        flops,
        *traffic(text, mesh),
        once + hlo.reread_bytes(text),
        hlo.estimated_cycles(text),
        hlo.custom_kernels(text),
    )


def after_lookup(lookup: Compiled, step: Compiled, memory: int) -> Compiled:
    """The step and the lookup before it as one program: total traffic, maximum memory.

    Args:
      lookup: the compiled lookup.
      step: the compiled step.
      memory: bytes per device of the lookup's result, which is part of the step's batch.
    """
    kinds = dict(step.bytes_per_device)
    table = kinds["memory_table"] = lookup.bytes_per_device["memory_table"]
    more = lookup.bytes_per_device["activations"] - memory - kinds["activations"]
    if more > 0:
        kinds["activations"] += more
    kinds["total"] += table + max(more, 0)
    traffic = dict(step.traffic)
    # The traffic of a rejected step is unknown, and that of the lookup alone would mislead.
    for kind, one in lookup.traffic.items() if step.why_not is None else ():
        other = traffic.get(kind, Traffic(0, 0))
        traffic[kind] = Traffic(one.count + other.count, one.bytes + other.bytes)
    return dataclasses.replace(
        step,
        bytes_per_device=kinds,
        traffic=traffic,
        between_slices=step.between_slices + lookup.between_slices,
        memory_traffic=step.memory_traffic + lookup.memory_traffic,
        cycles=step.cycles and step.cycles + lookup.cycles,
        kernels=step.kernels + lookup.kernels,
        why_not=step.why_not or lookup.why_not,
    )


def flops_of(program: Program, mesh: Mesh) -> int:
    """FLOPs of one step's matrix products, on all devices."""
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(program.function)(*program.arguments)
    return count_flops(jaxpr, program.while_trips)


def no_room(message: str, given: int) -> tuple[int, str] | None:
    """Bytes that a program needs, and the compiler's message; None for any other error.

    Args:
      message: of the compiler's error.
      given: bytes of the arguments, which some messages do not include.
    """
    for pattern, extra in ((_NO_ROOM, 0), (_NO_ROOM_FOR_TEMPORARIES, given)):
        if (match := pattern.search(message)) is not None:
            used, unit = match.groups()
            return round(float(used) * _UNITS[unit]) + extra, match.group(0)
    return None


def traffic(text: str, mesh: Mesh) -> tuple[dict[str, Traffic], int]:
    """Collectives of a program by kind, and the bytes of those that span slices.

    Transfers between slices through hosts have the kind `through-hosts`.
    """
    index: Any = np.indices(mesh.devices.shape).reshape(len(mesh.axis_names), -1)
    slices = index[mesh.axis_names.index("slice")]
    totals: dict[str, list[int]] = {}
    between = 0
    for collective in hlo.collectives(text):
        moved = collective.moved(mesh.size)
        count, size = totals.get(collective.kind, (0, 0))
        totals[collective.kind] = [count + collective.times, size + moved]
        between += moved if collective.joins(slices) else 0
    carried, size = hlo.from_other_slices(text)
    if carried:
        totals["through-hosts"] = [carried, size]
        between += size
    return {kind: Traffic(*total) for kind, total in sorted(totals.items())}, between
