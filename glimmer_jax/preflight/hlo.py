"""What a compiled program sends between devices, read from its text.

`compiled.as_text()` is a list of computations, each a list of instructions. An instruction may call
other computations, and a loop calls its body as often as it says (`known_trip_count`, or the number
that its condition compares with), so that a collective in a scanned layer counts once for each layer.
A loop that ends when the answer does is counted to its end.
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
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation|async_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{(\{[0-9,{} ]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[0-9,{} ]*\})\}")
# Who carries an array between slices, by the attribute of the transfer.
_FROM_SLICES = '_xla_host_transfer_handler_name="xla_megascale_runtime"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    kind: str  # one of `KINDS`
    size: int  # bytes of the whole array that the group works on, of one run
    groups: tuple[tuple[int, ...], ...]  # numbers of devices that take part together; () is all
    times: int  # how often it runs in one call of the program
    in_loop: bool

    def moved(self, devices: int) -> int:
        """Bytes that a device receives in all runs, on a ring.

        Args:
          devices: of the program.
        """
        ways = len(self.groups[0]) if self.groups else devices
        if self.kind == "collective-permute":
            return self.size * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return round(passes * self.size * (ways - 1) / max(ways, 1)) * self.times

    def joins(self, ways: np.ndarray) -> bool:
        """Whether any group has devices of different values in `ways`, int `[devices]`."""
        groups = self.groups or (tuple(range(len(ways))),)
        return any(len({int(ways[device]) for device in group}) > 1 for group in groups)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    kind: str
    result: str
    rest: str  # operands and attributes
    called: tuple[tuple[str, str], ...]  # attribute, computation


# Of TPU programs: a sum and each device's part of it, fused into one; a reduce-scatter.
_FUSED_SCATTER = "all-reduce-scatter"
_Computations = dict[str, list[_Instruction]]


def collectives(text: str) -> list[Collective]:
    """All collectives that the entry computation reaches, each with its number of runs."""
    found = []
    for run in _runs(text):
        kind = run.instruction.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        if kind == "all-reduce" and run.computation.startswith(_FUSED_SCATTER):
            kind = "reduce-scatter"
        size, groups = _size(run.instruction), _groups(run.instruction.rest)
        found.append(Collective(kind, size, groups, run.times, run.in_loop))
    return found


def from_other_slices(text: str) -> tuple[int, int]:
    """How often in a call, and bytes, a host hands to a device what came from other slices.

    In a TPU program of several slices collectives stay within one; between slices the hosts carry the
    arrays, and the device sees transfers from and to its host.
    """
    count = size = 0
    for run in _runs(text):
        if run.instruction.kind == "recv" and _FROM_SLICES in run.instruction.rest:
            count += run.times
            # Behind the array stands a number of the transfer.
            size += run.times * round(_array_bytes(run.instruction.result)[0])
    return count, size


def estimated_cycles(text: str) -> int:
    """Cycles that the TPU compiler expects of one call; 0 where it says nothing.

    An instruction's estimate includes what it calls, but for loops: their bodies are counted each
    time that they run. Collectives have no estimate.
    """
    total = 0
    for run in _runs(text, into=("body", "condition", "branch_computations")):
        found = _CYCLES.search(run.instruction.rest)
        if found and run.instruction.kind != "while":
            total += int(found.group(1)) * run.times
    return total


class _Run(NamedTuple):
    instruction: _Instruction
    computation: str  # that it is in
    times: int
    in_loop: bool


def _runs(text: str, into: tuple[str, ...] = ()) -> Iterator[_Run]:
    """Every instruction that is reached, how often, and whether in a loop.

    Args:
      text: of the program.
      into: attributes that are followed; none given, all.
    """
    entry, computations = _parse(text)

    def walk(name: str, times: int, in_loop: bool) -> Iterator[_Run]:
        for instruction in computations.get(name, ()):
            yield _Run(instruction, name, times, in_loop)
            loop = instruction.kind == "while"
            trips = _trips(instruction, computations) if loop else 1
            for attribute, called in instruction.called:
                # The sum of a reduction is no program of its own.
                if attribute == "to_apply" and instruction.kind != "call":
                    continue
                if into and attribute not in into and instruction.kind != "call":
                    continue
                yield from walk(called, times * trips, in_loop or loop)

    yield from walk(entry, 1, False)


def _trips(loop: _Instruction, computations: _Computations) -> int:
    if found := _TRIPS.search(loop.rest):
        return int(found.group(1))

    def constants(name: str) -> Iterator[int]:
        for instruction in computations.get(name, ()):
            if instruction.kind == "constant" and re.match(r"-?\d+\)", instruction.rest):
                yield int(instruction.rest.split(")")[0])
            for _, called in instruction.called:
                yield from constants(called)

    condition = dict(loop.called).get("condition", "")
    return max([1, *constants(condition)])


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
        found = _INSTRUCTION.match(line)
        if found:
            called = tuple(
                (attribute, name.strip(" {}%"))
                for attribute, names in _CALLED.findall(found.group(4))
                for name in names.split(",")
            )
            kind, result, rest = found.group(3), found.group(2), found.group(4)
            computations[current].append(_Instruction(kind, result, rest, called))
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
    """Of each array that is named in `text`."""
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
    """`'a'=4,'b'=2` and `'b'`, or a part of an axis `'a':(2)2`, the parts before it in brackets."""
    parts: dict[str, list[tuple[str, int]]] = {
        name: [(name, int(size))] for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)
    }
    taken = []
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along):
        if not size:
            taken.append(name)
            continue
        whole = math.prod(part for _, part in parts[name])
        after = whole // (int(before) * int(size))
        parts[name] = [("", int(before)), (f"{name}:", int(size)), ("", after)]
        taken.append(f"{name}:")
    flat = [part for one in parts.values() for part in one]
    devices = np.arange(math.prod(size for _, size in flat)).reshape([size for _, size in flat])
    last = [i for i, (name, _) in enumerate(flat) if name in taken]
    first = [i for i in range(len(flat)) if i not in last]
    ways = math.prod(flat[i][1] for i in last)
    rows = devices.transpose(first + last).reshape(-1, ways)
    return tuple(tuple(int(n) for n in row) for row in rows)
