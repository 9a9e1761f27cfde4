"""What is known of a job before it runs, as data and in words."""

import dataclasses
import json
from typing import Any

from glimmer_jax.preflight.chips import GIB


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one step."""

    count: int
    bytes: int  # that a device receives


@dataclasses.dataclass(frozen=True)
class Report:
    """One step of a job on a slice. Bytes and seconds are of the compiled program, not measured."""

    job: str
    topology: str
    slices: int
    chips: int
    hosts: int
    mesh: dict[str, int]
    batch_size: int  # questions of a step on all chips; passages for build_memory
    fits: bool
    bytes_per_chip: dict[str, int]  # by kind, and `total`
    hbm_bytes_per_chip: int
    flops_per_step: int  # matrix products on all chips, recomputed ones included
    model_flops_per_step: int  # without what remat computes again
    collectives: dict[str, Traffic]  # by kind
    bytes_between_slices: int  # of these, what a device receives in groups that span slices
    compute_seconds: float  # FLOPs at the chips' peak: no step is faster
    network_seconds: float  # the collectives at the links' peak, within slices
    # The compiler's cycles and the network's seconds, one after the other; None where it gives none.
    estimated_step_seconds: float | None
    model_flop_utilisation: float | None  # at that time
    # Gin macros that give the job this mesh; none where its gin files do.
    mesh_flags: dict[str, int] = dataclasses.field(default_factory=dict)
    why_not: str | None = None  # the compiler's words where it does not fit
    nearest: tuple[dict[str, Any], ...] = ()  # settings that fit, where this one does not
    tried: int = 0  # other settings that were compiled to find them

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def text(self) -> str:
        """Lines for people."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        used = {axis: size for axis, size in self.mesh.items() if size > 1} or {"data": 1}
        mesh = " x ".join(f"{axis} {size}" for axis, size in used.items())
        where = self.topology if self.slices == 1 else f"{self.slices} slices of {self.topology}"
        lines = [
            f"{self.job} on {where}: {verdict}.",
            f"{self.chips} chips, {self.hosts} hosts, mesh {mesh}, batch {self.batch_size}",
        ]
        if self.mesh_flags:
            # Without them the job would take another mesh, with whole parameters on each chip.
            action = "run it with" if self.fits else "that mesh is"
            lines.append(f"no mesh was given; {action}: {_settings(self.mesh_flags)}")
        lines.append(f"bytes a chip, of {_gib(self.hbm_bytes_per_chip)} HBM:")
        lines += [f"  {kind:14} {_gib(size)}" for kind, size in self.bytes_per_chip.items()]
        lines.append(
            f"a step: {self.flops_per_step / 1e12:.4g} TFLOP on all chips, "
            f"{self.model_flops_per_step / 1e12:.4g} of them the model's, the rest recomputed; "
            f"{_seconds(self.compute_seconds)} at the chips' peak"
        )
        for kind, traffic in self.collectives.items():
            lines.append(f"  {kind:18} {traffic.count:6} times, {_gib(traffic.bytes)} to a device")
        if self.collectives:
            lines.append(f"  {_seconds(self.network_seconds)} at the links' peak")
        if self.slices > 1:
            lines.append(
                f"  between slices {_gib(self.bytes_between_slices)} to a device, for which none of "
                "these times allows"
            )
        if self.estimated_step_seconds is not None:
            lines.append(
                f"the compiler expects {_seconds(self.estimated_step_seconds)}, "
                f"{self.model_flop_utilisation or 0:.0%} of the peak in the model's FLOPs"
            )
        if self.why_not:
            lines.append(f"the compiler: {self.why_not}")
        if not self.fits:
            lines += [f"these settings fit: {_settings(one)}" for one in self.nearest] or [
                f"none of {self.tried} other settings fits; take more or larger chips"
            ]
        return "\n".join(lines)


def _settings(settings: dict[str, Any]) -> str:
    return " ".join(f"--gin.{name}={value!r}" for name, value in settings.items())


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
