"""TPU generations, and slices of them without the hardware.

A slice is written as Google Cloud does, `v5p:4x4x4`: the generation and the chips along each side.
"""

import dataclasses
import math
import os
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by the tables of cloud.google.com/tpu/docs (system architecture, each generation)."""

    hbm_bytes: int
    peak_flops: float  # a second, bfloat16, dense; a multiply-add is two
    ici_bandwidth: float  # bytes a second and direction, all links of a chip together
    # Cycles a second of a core: what the peak is made of, by the published sizes of the matrix units.
    clock: float
    devices: int = 1  # that JAX sees on a chip
    sides: int = 2  # dimensions of a topology


GIB = 2**30
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 300e9, 1.05e9, sides=3),
    "v5e": Chip(16 * GIB, 197e12, 200e9, 1.5e9),
    "v5p": Chip(95 * GIB, 459e12, 600e9, 1.75e9, sides=3),
    "v6e": Chip(32 * GIB, 918e12, 400e9, 1.75e9),
    "tpu7x": Chip(192 * GIB, 2307e12, 600e9, 2.2e9, devices=2, sides=3),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape."""

    generation: str  # a key of `CHIPS`
    shape: tuple[int, ...]  # chips along each side of one slice
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5p:4x4x4` -> the slice, or several of it.

    Raises:
      ValueError: not a generation and its sides.
    """
    generation, _, sides = text.partition(":")
    chip = CHIPS.get(generation)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise ValueError(
            f"--topology={text!r} is no TPU slice: write one of {', '.join(CHIPS)}, a colon and the "
            "chips along each side, such as v5p:4x4x4 or v6e:16x16."
        )
    shape = tuple(int(side) for side in sides.split("x"))
    if len(shape) != chip.sides:
        raise ValueError(
            f"--topology={text!r} has {len(shape)} sides, and slices of {generation} have "
            f"{chip.sides}: such as {generation}:{'x'.join(['4'] * chip.sides)}."
        )
    return Topology(generation, shape, slices)


def devices(topology: Topology) -> list[Any]:
    """The devices of slices that are not there; programs can be compiled for them, and no more.

    Raises:
      ValueError: no TPU compiler is installed, or it knows no such slice.
    """
    # The compiler would look for the TPU machine it runs on, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # And would complain of what it did not find there; a topology asks for neither.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    # And would take the machine's TPU for itself alone; here, many may compile side by side.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401 (what JAX loads)
    except ImportError:
        raise ValueError(
            "Preflight needs XLA's TPU compiler, the wheel libtpu: in the checkout, pip install -c "
            "constraints.txt -e '.[preflight]'. It runs on any x86-64 Linux machine."
        ) from None
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.generation == "v4":
        # Both cores of a chip as one device, which is how JAX runs on them.
        options["chip_config_name"] = "megacore"
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"The TPU compiler gives no slice {topology.name}: {str(error).splitlines()[0]}"
        ) from error
    return list(found.devices)
