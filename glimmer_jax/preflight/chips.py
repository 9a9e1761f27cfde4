"""TPU generations, and devices of slices that are not attached.

Topologies are written as in Google Cloud, `v5p:4x4x4`: the generation and the chips along each side.
"""

import dataclasses
import math
import os
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Source: cloud.google.com/tpu/docs, system architecture of each generation."""

    hbm_bytes: int
    hbm_bandwidth: float  # bytes per second
    peak_flops: float  # per second, dense bfloat16; a multiply-add counts as two
    ici_bandwidth: float  # bytes per second and direction, all links of a chip
    # Cycles per second of a core, derived from the peak and the published sizes of the matrix units.
    clock: float
    devices: int = 1  # JAX devices per chip
    sides: int = 2  # dimensions of a topology


GIB = 2**30
CHIPS = {
    "v4": Chip(32 * GIB, 1228e9, 275e12, 300e9, 1.05e9, sides=3),
    "v5e": Chip(16 * GIB, 819e9, 197e12, 200e9, 1.5e9),
    "v5p": Chip(95 * GIB, 2765e9, 459e12, 600e9, 1.75e9, sides=3),
    "v6e": Chip(32 * GIB, 1640e9, 918e12, 400e9, 1.75e9),
    "tpu7x": Chip(192 * GIB, 7380e9, 2307e12, 600e9, 2.2e9, devices=2, sides=3),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more slices of the same shape."""

    generation: str  # a key of `CHIPS`
    shape: tuple[int, ...]  # chips along each side of one slice
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The chip of the topology's generation."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """Generation and shape of one slice, such as `v5p:2x2x1`."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5p:4x4x4` -> a topology of `slices` slices.

    Raises:
      ValueError: unknown generation, or a wrong number of sides.
    """
    generation, _, sides = text.partition(":")
    chip = CHIPS.get(generation)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise ValueError(
            f"--topology={text!r} must be one of {', '.join(CHIPS)}, a colon and the chips along each "
            "side, such as v5p:4x4x4 or v6e:16x16."
        )
    shape = tuple(int(side) for side in sides.split("x"))
    if len(shape) != chip.sides:
        raise ValueError(
            f"--topology={text!r} needs {chip.sides} sides, got {len(shape)}: for example "
            f"{generation}:{'x'.join(['4'] * chip.sides)}."
        )
    return Topology(generation, shape, slices)


def devices(topology: Topology) -> list[Any]:
    """Devices of slices that are not attached. Programs can be compiled for them, but not run.

    Raises:
      ValueError: no TPU compiler is installed, or it does not support the topology.
    """
    # The compiler would query the metadata server of a TPU machine for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # It would warn about missing values, although a topology needs neither.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    # It would lock the machine's TPU; several processes may compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401 (what JAX loads)
    except ImportError:
        raise ValueError(
            "--run_mode=preflight needs XLA's TPU compiler (libtpu), for any x86-64 Linux machine. In "
            "the checkout: pip install -c constraints.txt -e '.[preflight]'"
        ) from None
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.generation == "v4":
        # Both cores of a chip as one device, as in JAX on v4.
        options["chip_config_name"] = "megacore"
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology={topology.name} is not supported by libtpu: {str(error).splitlines()[0]}"
        ) from error
    return list(description.devices)
