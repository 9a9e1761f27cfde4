"""Collectives and estimated cycles of a compiled program, read from its HLO text.

`compiled.as_text()` is a list of computations, each a list of instructions. Instructions may call other
computations. A loop runs its body `known_trip_count` times, or as often as its condition's limit and
the step of its counter imply, so that a collective in a scanned layer counts once per layer. A loop
that ends early when all answers are complete counts with its maximum.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}

_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_NAME = re.compile(r"%?([A-Za-z_][\w.\-]*)(?=,|$|\))")
_TUPLE_INDEX = re.compile(r"index=(\d+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation|async_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Modules have names in lower case, and methods follow a dot.
_MODULE = re.compile(r"([a-z][a-z0-9_]*?)(?:_\d+)?(?:\..*)?")
_NO_PART = re.compile("layers|dropout|while|body|cond|closed_call|checkpoint|rematted_computation")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{(\{[0-9,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[0-9,{} ]*\})\}")
# Layout of arrays in a TPU's on-chip memory.
_ON_CHIP = "S(1)"
_PARTIAL_READS = ("dynamic-slice", "dynamic-slice-start", "gather")
# Attribute of transfers between slices.
_FROM_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, seen from one device."""

    kind: str  # one of `KINDS`
    size: int  # bytes of the complete array of the group, per execution
    groups: tuple[tuple[int, ...], ...]  # device indices of each group; () is one group of all
    times: int  # executions per call of the program
    in_loop: bool

    def moved(self, devices: int) -> int:
        """Bytes that a device receives in all executions, on a ring.

        Args:
          devices: number of devices of the program.
        """
        ways = len(self.groups[0]) if self.groups else devices
        if self.kind == "collective-permute":
            return self.size * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return round(passes * self.size * (ways - 1) / max(ways, 1)) * self.times

    def joins(self, ways: np.ndarray) -> bool:
        """Whether any group contains devices with different values in `ways`, int `[devices]`."""
        groups = self.groups or (tuple(range(len(ways))),)
        return any(len({int(ways[device]) for device in group}) > 1 for group in groups)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    result: str
    rest: str  # operands and attributes
    called: tuple[tuple[str, str], ...]  # attribute, computation
    is_root: bool


# A TPU program fuses an all-reduce with the slice of each device into a reduce-scatter.
_FUSED_SCATTER = "all-reduce-scatter"
_Computations = dict[str, list[_Instruction]]


def collectives(text: str) -> list[Collective]:
    """All collectives reachable from the entry computation, with their number of executions."""
    result = []
    for run in _runs(text):
        kind = run.instruction.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        if kind == "all-reduce" and run.computation.startswith(_FUSED_SCATTER):
            kind = "reduce-scatter"
        size, groups = _size(run.instruction), _groups(run.instruction.rest)
        result.append(Collective(kind, size, groups, run.times, run.in_loop))
    return result


def from_other_slices(text: str) -> tuple[int, int]:
    """Number and bytes of transfers that a device receives from other slices, per call.

    In a TPU program for several slices, collectives stay within a slice. Hosts carry the arrays between
    slices, and the program contains transfers from and to the host.
    """
    count = size = 0
    for run in _runs(text):
        if run.instruction.kind == "recv" and _FROM_SLICES in run.instruction.rest:
            count += run.times
            # The first array is the payload, followed by the transfer's number.
            size += run.times * round(_array_bytes(run.instruction.result)[0])
    return count, size


def estimated_cycles(text: str) -> dict[str, int]:
    """The TPU compiler's estimate of cycles per call, by part of the model; empty without estimates.

    An instruction's estimate includes the computations it calls, except for loops, whose bodies are
    counted once per iteration. Collectives and custom kernels have no estimate. A fusion counts for
    the part of its last operation.
    """
    parts: dict[str, int] = {}
    for run in _runs(text, into=("body", "condition", "branch_computations")):
        cycles = _CYCLES.search(run.instruction.rest)
        if cycles and run.instruction.kind != "while":
            name = _OP_NAME.search(run.instruction.rest)
            part = _part(name.group(1) if name else "")
            parts[part] = parts.get(part, 0) + int(cycles.group(1)) * run.times
    return parts


def _part(op_name: str) -> str:
    """`jit(step)/jvp(Glimmer)/Glimmer.read/live_encoder.last/live_b/layers_3/mlp/wo/dot_general` to
    `live_encoder/live_b/mlp/wo`: the modules, of which any layer counts for all. Otherwise `other`.
    """
    names = [_MODULE.fullmatch(scope) for scope in op_name.split("/")[:-1]]
    modules = [name.group(1) for name in names if name and not _NO_PART.fullmatch(name[1])]
    return "/".join(dict.fromkeys(modules)) or "other"


def reread_bytes(text: str) -> int:
    """Bytes of loop-invariant arrays that iterations after the first read again, per call.

    Decoding reads all decoder weights, keys and values once per token. Arrays in on-chip memory, and
    arrays of which an iteration reads a slice (scanned parameters, embeddings), are not counted.
    """
    _, computations = _parse(text)
    total = 0
    for run in _runs(text):
        if run.instruction.kind == "while":
            repeats = run.times * (_trips(run.instruction, computations) - 1)
            body = dict(run.instruction.called).get("body", "")
            total += repeats * _invariant_bytes(body, computations)
    return total


def _invariant_bytes(name: str, computations: _Computations) -> int:
    """Bytes of the loop state that the body passes on unchanged and reads completely."""
    body = {instruction.name: instruction for instruction in computations.get(name, ())}
    size = 0
    for index, element in enumerate(_operands(_root(body), body)):
        position = _TUPLE_INDEX.search(element.rest)
        if element.kind != "get-tuple-element" or position is None:
            continue
        if int(position.group(1)) == index and _is_read(element, body, computations):
            size += sum(map(round, _array_bytes(element.result)))
    return size


def _is_read(
    array: _Instruction, body: dict[str, _Instruction], computations: _Computations
) -> bool:
    """Whether a computation reads all of `array` from main memory."""
    if _ON_CHIP in array.result:
        return False
    for reader in body.values():
        positions = [i for i, x in enumerate(_operands(reader, body)) if x is array]
        if not positions or reader.kind in ("tuple", "while", *_PARTIAL_READS):
            continue
        if reader.kind == "bitcast":
            # The root of a fusion, or an alias of the array.
            if reader.is_root or _is_read(reader, body, computations):
                return True
        elif reader.kind == "fusion":
            fused = {one.name: one for one in computations[dict(reader.called)["calls"]]}
            parameters = [fused[n] for n in fused if fused[n].kind == "parameter"]
            numbered = {one.rest.partition(")")[0]: one for one in parameters}
            if any(_is_read(numbered[str(i)], fused, computations) for i in positions):
                return True
        else:
            return True
    return False


def custom_kernels(text: str) -> int:
    """Executions per call of custom kernels (Pallas), which have no cycle estimate."""
    return sum(
        run.times
        for run in _runs(text)
        if 'custom_call_target="tpu_custom_call"' in run.instruction.rest
    )


class _Run(NamedTuple):
    instruction: _Instruction
    computation: str  # name of the enclosing computation
    times: int
    in_loop: bool


def _runs(text: str, into: tuple[str, ...] = ()) -> Iterator[_Run]:
    """Every reachable instruction, its number of executions, and whether it is in a loop.

    Args:
      text: HLO text of the program.
      into: attributes whose computations are visited; empty for all.
    """
    entry, computations = _parse(text)

    def walk(name: str, times: int, in_loop: bool) -> Iterator[_Run]:
        for instruction in computations.get(name, ()):
            yield _Run(instruction, name, times, in_loop)
            loop = instruction.kind == "while"
            trips = _trips(instruction, computations) if loop else 1
            for attribute, called in instruction.called:
                # The scalar function of a reduction is not a program.
                if attribute == "to_apply" and instruction.kind != "call":
                    continue
                if into and attribute not in into and instruction.kind != "call":
                    continue
                yield from walk(called, times * trips, in_loop or loop)

    yield from walk(entry, 1, False)


def _trips(loop: _Instruction, computations: _Computations) -> int:
    """Iterations of a loop that counts from 0: limit / step, rounded up."""
    if trips := _TRIPS.search(loop.rest):
        return int(trips.group(1))
    called = dict(loop.called)

    def constants(name: str) -> Iterator[int]:
        for instruction in computations.get(name, ()):
            if (value := _constant(instruction)) is not None:
                yield value
            for _, inner in instruction.called:
                yield from constants(inner)

    limit = max([1, *constants(called.get("condition", ""))])
    condition, body = (
        {one.name: one for one in computations.get(called.get(name, ""), ())}
        for name in ("condition", "body")
    )
    return -(-limit // _step(condition, body))


def _step(condition: dict[str, _Instruction], body: dict[str, _Instruction]) -> int:
    """The constant that the body adds to the counter that the condition compares; 1 if unknown."""
    updates = _operands(_root(body), body)
    for compared in _operands(_root(condition), condition):
        index = _TUPLE_INDEX.search(compared.rest) if compared.kind == "get-tuple-element" else None
        if index is None or int(index.group(1)) >= len(updates):
            continue
        update = updates[int(index.group(1))]
        if update.kind == "add":
            steps = [_constant(operand) for operand in _operands(update, body)]
            return max((step for step in steps if step), default=1)
    return 1


def _root(computation: dict[str, _Instruction]) -> _Instruction | None:
    return next((one for one in computation.values() if one.is_root), None)


def _operands(
    instruction: _Instruction | None, computation: dict[str, _Instruction]
) -> list[_Instruction]:
    """The instructions that `instruction` reads, in order."""
    if instruction is None:
        return []
    names = _NAME.findall(instruction.rest.partition("), ")[0])
    return [computation[name] for name in names if name in computation]


def _constant(instruction: _Instruction) -> int | None:
    value = re.match(r"(-?\d+)\)", instruction.rest) if instruction.kind == "constant" else None
    return int(value.group(1)) if value else None


def _parse(text: str) -> tuple[str, _Computations]:
    entry, current = "", ""
    computations: _Computations = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = head.group(2)
                computations[current] = []
                entry = current if head.group(1) else entry
            continue
        if match := _INSTRUCTION.match(line):
            root, name, result, kind, rest = match.groups()
            called = tuple(
                (attribute, callee.strip(" {}%"))
                for attribute, callees in _CALLED.findall(rest)
                for callee in callees.split(",")
            )
            instruction = _Instruction(name, kind, result, rest, called, root is not None)
            computations[current].append(instruction)
    return entry, computations


def _size(instruction: _Instruction) -> int:
    arrays = _array_bytes(instruction.result)
    kind = instruction.kind
    if kind == "collective-permute-start":
        arrays = arrays[:1]  # operand, result, and two counters
    elif kind == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]  # operands, then results
    size = sum(arrays)
    if kind == "reduce-scatter":
        groups = _groups(instruction.rest)
        size *= len(groups[0]) if groups else 1
    return round(size)


def _array_bytes(text: str) -> list[float]:
    """Bytes of each array type in `text`."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * _item_bytes(dtype)
        for dtype, dims in _ARRAY.findall(text)
    ]


def _item_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)  # f32, s8, f8e4m3fn
    return int(digits.group(1)) / 8 if digits else 0


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    if found := _IOTA.search(rest):
        shape, order, turned = ([int(n) for n in (g or "").split(",") if n] for g in found.groups())
        devices = np.arange(math.prod(order)).reshape(order)
        if turned:
            devices = devices.transpose(turned)
        return tuple(tuple(int(n) for n in row) for row in devices.reshape(shape))
    if found := _AXES.search(rest):
        return _groups_along(*found.groups())
    if found := _LISTED.search(rest) or _PAIRS.search(rest):
        rows = re.findall(r"\{([0-9, ]+)\}", found.group(1))
        return tuple(tuple(int(n) for n in row.split(",")) for row in rows)
    return ()


def _groups_along(mesh: str, along: str) -> tuple[tuple[int, ...], ...]:
    """Groups along mesh axes, from `'a'=4,'b'=2` and `'b'`, or a sub-axis `'a':(2)2`.

    The bracket of a sub-axis holds the product of the sub-axes before it.
    """
    parts: dict[str, list[tuple[str, int]]] = {
        name: [(name, int(size))] for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)
    }
    grouped = []
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along):
        if not size:
            grouped.append(name)
            continue
        whole = math.prod(part for _, part in parts[name])
        after = whole // (int(before) * int(size))
        parts[name] = [("", int(before)), (f"{name}:", int(size)), ("", after)]
        grouped.append(f"{name}:")
    flat = [part for axis_parts in parts.values() for part in axis_parts]
    devices = np.arange(math.prod(size for _, size in flat)).reshape([size for _, size in flat])
    last = [i for i, (name, _) in enumerate(flat) if name in grouped]
    first = [i for i in range(len(flat)) if i not in last]
    ways = math.prod(flat[i][1] for i in last)
    rows = devices.transpose(first + last).reshape(-1, ways)
    return tuple(tuple(int(n) for n in row) for row in rows)
