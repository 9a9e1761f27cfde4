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
    """A job's programs, compiled or rejected for lack of memory."""

    bytes_per_device: dict[str, int]  # by kind, and `total`
    returned: int  # bytes of the results per device, part of the activations
    flops: int  # on all devices
    traffic: dict[str, Traffic]
    between_slices: int  # bytes that a device receives from other slices
    memory_traffic: int  # bytes that a device at least reads from and writes to its memory
    cycles: dict[str, int]  # the compiler's estimate by part of the model; empty without one
    kernels: int  # executions of custom kernels, which have no estimate
    why_not: str | None = None  # the compiler's message if there is not enough memory


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compiles for the mesh's devices without running anything; programs that follow as well."""
    given = program.bytes_by_kind()
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments)
        flops = count_flops(traced.jaxpr, program.while_trips)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            why = no_room(str(error), sum(given.values()))
            if why is None:
                raise
            used, message = why
            kinds = {**given, "activations": max(used - sum(given.values()), 0), "total": used}
            if program.then is not None:
                flops += flops_of(program.then(traced.out_info), mesh)
            return Compiled(kinds, 0, flops, {}, 0, 0, {}, 0, message)
    memory = compiled.memory_analysis()
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Arguments are padded. Unused arguments occupy memory as well.
    padding = max(memory.argument_size_in_bytes - sum(given.values()), 0)
    activations = memory.temp_size_in_bytes + returned + memory.generated_code_size_in_bytes
    activations += padding
    text = compiled.as_text()
    once = memory.argument_size_in_bytes + memory.output_size_in_bytes
    first = Compiled(
        {**given, "activations": activations, "total": sum(given.values()) + activations},
        returned,
        flops,
        *traffic(text, mesh),
        once + hlo.reread_bytes(text),
        hlo.estimated_cycles(text),
        hlo.custom_kernels(text),
    )
    if program.then is None:
        return first
    results = jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        traced.out_info,
        compiled.output_shardings,
    )
    return in_sequence(first, compile_program(program.then(results), mesh))


def in_sequence(first: Compiled, second: Compiled) -> Compiled:
    """Two programs, of which the second reads the first one's results: total work, maximum memory.

    Arguments of both stay in memory throughout. The results are among the second one's.
    """
    kinds = first.bytes_per_device | second.bytes_per_device
    kinds["activations"] = max(
        first.bytes_per_device["activations"] - first.returned,
        second.bytes_per_device["activations"],
    )
    del kinds["total"]
    why_not = first.why_not or second.why_not
    both: dict[str, Traffic] = {}
    # The traffic of a rejected program is unknown, and that of the other alone would mislead.
    for one in (first.traffic, second.traffic) if why_not is None else ():
        for kind, more in one.items():
            known = both.get(kind, Traffic(0, 0))
            both[kind] = Traffic(known.count + more.count, known.bytes + more.bytes)
    return Compiled(
        {**kinds, "total": sum(kinds.values())},
        second.returned,
        first.flops + second.flops,
        both,
        first.between_slices + second.between_slices,
        first.memory_traffic + second.memory_traffic,
        _sums(first.cycles, second.cycles) if first.cycles and second.cycles else {},
        first.kernels + second.kernels,
        why_not,
    )


def _sums(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in first | second}


def flops_of(program: Program, mesh: Mesh) -> int:
    """FLOPs of one step's matrix products, on all devices."""
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments)
    flops = count_flops(traced.jaxpr, program.while_trips)
    return flops if program.then is None else flops + flops_of(program.then(traced.out_info), mesh)


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
