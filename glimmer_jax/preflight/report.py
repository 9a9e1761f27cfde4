"""The preflight report, as data and as text."""

import dataclasses
import json
from typing import Any

from glimmer_jax.preflight.chips import GIB

_PARTS = 8  # parts that the text names


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind per step."""

    count: int
    bytes: int  # that a device receives


@dataclasses.dataclass(frozen=True)
class Report:
    """One step of a job on a slice. Bytes and seconds are derived from the program, not measured."""

    job: str
    topology: str
    slices: int
    chips: int
    hosts: int
    mesh: dict[str, int]
    batch_size: int  # questions per step on all chips; passages for build_memory
    fits: bool
    bytes_per_chip: dict[str, int]  # by kind, and `total`
    hbm_bytes_per_chip: int
    flops_per_step: int  # matrix products on all chips, recomputation included
    model_flops_per_step: int  # without recomputation
    collectives: dict[str, Traffic]  # by kind
    # Received by a device in collectives that span slices; None for programs that were rejected.
    bytes_between_slices: int | None
    compute_seconds: float  # FLOPs at peak: a lower bound of the step
    # Of programs that the compiler rejected, memory traffic and collectives are unknown.
    memory_seconds: (
        float | None
    )  # least memory traffic at peak bandwidth: a lower bound of the step
    network_seconds: float | None  # the collectives at peak link bandwidth, within slices
    # The compiler's cycles plus `network_seconds`; None without an estimate.
    estimated_step_seconds: float | None
    model_flop_utilisation: float | None  # at that time
    # Its seconds by part of the model, the longest first: modules of any layer, `collectives`, and
    # `other`, which includes the optimiser. Empty without an estimate.
    estimated_parts: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: int = 0  # executions of custom kernels, which the estimate does not include
    # Gin macros that select this mesh; empty if the gin files give it.
    mesh_flags: dict[str, int] = dataclasses.field(default_factory=dict)
    why_not: str | None = None  # the compiler's message if it does not fit
    nearest: tuple[dict[str, Any], ...] = ()  # settings that fit, if this one does not
    nearest_report: "Report | None" = None  # with them
    tried: int = 0  # settings compiled in the search for them

    def as_json(self) -> str:
        """The report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def text(self) -> str:
        """A readable summary."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        used = {axis: size for axis, size in self.mesh.items() if size > 1} or {"data": 1}
        mesh = " x ".join(f"{axis} {size}" for axis, size in used.items())
        where = self.topology if self.slices == 1 else f"{self.slices} slices of {self.topology}"
        lines = [
            f"{self.job} on {where}: {verdict}.",
            f"{self.chips} chips, {self.hosts} hosts, mesh {mesh}, batch {self.batch_size}",
        ]
        if self.mesh_flags:
            # Without these flags the job would use the default mesh.
            action = "run it with" if self.fits else "it was compiled with"
            lines.append(f"no mesh was given; {action}: {_settings(self.mesh_flags)}")
        lines.append(f"bytes per chip, of {_gib(self.hbm_bytes_per_chip)} HBM:")
        lines += [f"  {kind:14} {_gib(size)}" for kind, size in self.bytes_per_chip.items()]
        lines.append(
            f"per step: {self.flops_per_step / 1e12:.4g} TFLOP on all chips, "
            f"{self.model_flops_per_step / 1e12:.4g} without recomputation"
        )
        bounds = [f"{_seconds(self.compute_seconds)} at peak FLOPs"]
        if self.memory_seconds is not None:
            bounds.append(f"{_seconds(self.memory_seconds)} at peak HBM bandwidth")
        lines.append(f"  lower bounds: {', '.join(bounds)}")
        for kind, traffic in self.collectives.items():
            lines.append(f"  {kind:18} {traffic.count:6} times, {_gib(traffic.bytes)} per device")
        if self.collectives and self.network_seconds is not None:
            lines.append(f"  {_seconds(self.network_seconds)} at peak link bandwidth")
        if self.slices > 1 and self.bytes_between_slices is not None:
            lines.append(
                f"  between slices {_gib(self.bytes_between_slices)} per device, not included in "
                "any of these times"
            )
        if self.estimated_step_seconds is not None:
            lines.append(
                f"compiler's estimate {_seconds(self.estimated_step_seconds)}: "
                f"{self.model_flop_utilisation or 0:.0%} of peak FLOPs, without recomputation"
            )
        for part in list(self.estimated_parts)[:_PARTS]:
            lines.append(f"  {part:36} {_seconds(self.estimated_parts[part])}")
        if self.kernels:
            lines.append(f"  without {self.kernels} custom kernels, which have no estimate")
        if self.why_not:
            lines.append(f"the compiler: {self.why_not}")
        if not self.fits:
            lines += [f"these settings fit: {_settings(macros)}" for macros in self.nearest] or [
                f"none of {self.tried} other settings fits; use more or larger chips"
            ]
        if self.nearest_report is not None:
            lines.append(f"with them: {self.nearest_report.summary()}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Bytes and the estimate, in one line."""
        parts = [f"{_gib(self.bytes_per_chip['total']).strip()} per chip"]
        if self.estimated_step_seconds is not None:
            parts.append(f"compiler's estimate {_seconds(self.estimated_step_seconds)}")
        return ", ".join(parts)


def _settings(settings: dict[str, Any]) -> str:
    return " ".join(f"--gin.{name}={value!r}" for name, value in settings.items())


def _gib(size: int) -> str:
    return f"{size / GIB:8.3f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
