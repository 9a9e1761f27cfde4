"""Mode `preflight`: checks whether a job fits a TPU slice, with XLA's TPU compiler.

It compiles the job's own step with the job's own settings, and runs nothing. Shapes suffice, so that
paths and tasks are not needed.
"""

import bisect
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.modes import checks
from glimmer_jax.modes.settings import flatten
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import chips, programs
from glimmer_jax.preflight.compiling import Compiled, compile_program, flops_of, in_sequence
from glimmer_jax.preflight.nearest import changes, macros_of, with_remat
from glimmer_jax.preflight.programs import JOBS, Settings
from glimmer_jax.preflight.report import Report
from glimmer_jax.storage import folder

# Placeholders for macros that run files require, with the paper's lengths.
UNBOUND = {
    "MODEL_DIR": "''",
    "MIXTURE_OR_TASK_NAME": "''",
    "MIXTURE_OR_TASK_MODULE": "None",
    "TASK_FEATURE_LENGTHS": "{'inputs': 48, 'targets': 32, 'passages': (40, 304)}",
    "TRAIN_STEPS": "1000",
    "MAX_PASSAGE_TOKENS": "304",
    "PASSAGES_DIR": "None",
    "CHECKPOINT_PATH": "''",
    "MEMORY_DIR": "None",
}


def preflight(
    job: str, settings: Settings, topology: str | None, json_path: str | None = None
) -> Report:
    """Prints a report and optionally writes it as JSON.

    Args:
      job: train, build_memory, eval or infer.
      settings: arguments of the job's function from gin.
      topology: such as `v5p:4x4x4`; of each slice if the mesh has several.
      json_path: file for the report.

    Raises:
      ValueError: unknown topology, missing compiler, or incompatible settings.
    """
    if topology is None:
        raise ValueError("--run_mode=preflight needs --topology, such as v5p:4x4x4 or v6e:16x16.")
    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise ValueError(f"--json={json_path}: its folder does not exist. Create it first.")
    if json_path is not None and Path(json_path).exists() and not Path(json_path).is_file():
        raise ValueError(f"--json={json_path} is no regular file. Choose another path.")
    settings = flatten(settings)
    # There is no checkpoint to take it from.
    checks.required(MODEL=settings["model"])
    slices = 1 if job == "build_memory" else max(settings["mesh"].slice, 1)
    place = chips.parse_topology(topology, slices)
    devices = chips.devices(place)
    config = mesh_for(job, settings, len(devices), place.chip.hbm_bytes // place.chip.devices)
    report = examine(job, {**settings, "mesh": config}, place, devices)
    report = dataclasses.replace(report, mesh_flags=mesh_flags(job, settings, config))
    if not report.fits:
        report = _with_nearest(report, job, settings, config, place, devices)
    print(report.text(), flush=True)
    if json_path is not None:
        folder.write_file(*folder.of_file(json_path), (report.as_json() + "\n").encode())
    return report


def mesh_for(job: str, settings: Settings, count: int, device_bytes: int) -> MeshConfig:
    """The mesh in `settings`, or a proposal for `count` devices if it has no sizes.

    Training shards over `fsdp`, and over `passages` where there are more devices than questions.
    Answering would gather all weights for every batch on an `fsdp` mesh: parameters are replicated if
    they fit, and sharded over `model` otherwise.

    Args:
      job: a key of `JOBS`.
      settings: arguments of the job's function.
      count: devices of all slices.
      device_bytes: memory of a device.
    """
    given: MeshConfig = settings["mesh"]
    if job == "build_memory":
        return MeshConfig()
    if not _is_open(given):
        return given.filled(count)
    slices = max(given.slice, 1)
    devices, batch = count // slices, settings["batch_size"] // slices
    if job != "train":
        return dataclasses.replace(
            _answering_mesh(settings, devices, batch, device_bytes), slice=slices
        )
    passages = devices // batch if devices > batch and batch and devices % batch == 0 else 1
    return MeshConfig(data=1, fsdp=devices // passages, passages=passages, slice=slices)


def _answering_mesh(settings: Settings, devices: int, batch: int, device_bytes: int) -> MeshConfig:
    """`model` until the parameters fit, then `data` for the batch, `passages` for few questions."""
    t5 = settings["model"].config.t5
    heads = math.gcd(t5.encoder_sizes.num_heads, t5.decoder_sizes.num_heads)
    shapes, _ = settings["model"].abstract_variables()
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes)) * jnp.dtype(t5.dtype).itemsize
    # Half of what the memory table leaves is for activations, keys and values.
    room = (device_bytes - (settings.get("memory_bytes_per_device") or 0)) // 2
    model = 1
    while size // model > room and devices % (model * 2) == 0 and heads % (model * 2) == 0:
        model *= 2
    data = math.gcd(devices // model, batch)
    lengths = check_lengths(settings["task_feature_lengths"])
    passages = math.gcd(devices // model // data, lengths.passages)
    return MeshConfig(data, model=devices // data // passages, passages=passages)


def mesh_flags(job: str, settings: Settings, chosen: MeshConfig) -> dict[str, int]:
    """Gin macros that select the proposed mesh; empty if the gin files give one."""
    if job == "build_memory" or not _is_open(settings["mesh"]):
        return {}
    # The default of gin/mesh.gin has all devices on `data`.
    return macros_of(MeshConfig(), chosen)


def _is_open(given: MeshConfig) -> bool:
    """Whether `given` has no sizes, except for the number of slices."""
    return dataclasses.replace(given, slice=1) == MeshConfig()


def examine(job: str, settings: Settings, place: chips.Topology, devices: list[Any]) -> Report:
    """Compiles one setting."""
    mesh = make_mesh(settings["mesh"], devices)
    model = settings["model"]
    if job != "build_memory":
        lengths: Lengths = checks.lengths_for(model.config, settings["task_feature_lengths"])
        loop = settings.get("loop_config")
        parts = loop.num_microbatches if loop is not None else 1
        checks.batch_size("BATCH_SIZE", settings["batch_size"], mesh, parts)
        checks.passages_divide(lengths, mesh)
    program = JOBS[job](settings, mesh)
    compiled = compile_program(program, mesh)
    if (lookup := programs.lookup(settings, mesh)) is not None:
        compiled = in_sequence(compile_program(lookup, mesh), compiled)
    model_flops = compiled.flops
    if job == "train" and model.config.t5.remat_policy != "none":
        plain = {**settings, "model": with_remat(model, "none")}
        model_flops = flops_of(JOBS[job](plain, mesh), mesh)
    return _report(job, settings, place, devices, mesh, compiled, model_flops)


def _report(
    job: str,
    settings: Settings,
    place: chips.Topology,
    devices: list[Any],
    mesh: jax.sharding.Mesh,
    compiled: Compiled,
    model_flops: int,
) -> Report:
    chip = place.chip
    bytes_per_chip = {kind: size * chip.devices for kind, size in compiled.bytes_per_device.items()}
    total = bytes_per_chip.pop("total")
    optimiser = bytes_per_chip.pop("optimiser", 0)
    table = bytes_per_chip.pop("memory_table", 0)
    bytes_per_chip = {
        "parameters": bytes_per_chip.pop("parameters"),
        "optimiser": optimiser,
        **bytes_per_chip,
        "memory_table": table,
        "total": total,
    }
    peak = chip.peak_flops * place.chips
    received = sum(traffic.bytes for traffic in compiled.traffic.values()) - compiled.between_slices
    rejected = compiled.why_not is not None
    network = received * chip.devices / chip.ici_bandwidth
    memory = compiled.memory_traffic * chip.devices / chip.hbm_bandwidth
    # Without overlap: the compiler estimates computation, but not collectives.
    parts = {part: cycles / chip.clock for part, cycles in compiled.cycles.items()}
    if parts:
        parts["collectives"] = network
    seconds = sum(parts.values()) if parts else None
    batch = settings["batch_size"] * (len(devices) if job == "build_memory" else 1)
    return Report(
        job=job,
        topology=place.name,
        slices=place.slices,
        chips=place.chips,
        hosts=len({device.process_index for device in devices}),
        mesh=dict(mesh.shape),
        batch_size=batch,
        fits=not rejected and total <= chip.hbm_bytes,
        bytes_per_chip=bytes_per_chip,
        hbm_bytes_per_chip=chip.hbm_bytes,
        flops_per_step=compiled.flops,
        model_flops_per_step=model_flops,
        collectives=compiled.traffic,
        bytes_between_slices=None if rejected else compiled.between_slices,
        compute_seconds=compiled.flops / peak,
        memory_seconds=None if rejected else memory,
        network_seconds=None if rejected else network,
        estimated_step_seconds=seconds,
        model_flop_utilisation=model_flops / peak / seconds if seconds else None,
        estimated_parts=dict(sorted(parts.items(), key=lambda part: -part[1])),
        kernels=compiled.kernels,
        why_not=compiled.why_not,
    )


def _with_nearest(
    report: Report,
    job: str,
    settings: Settings,
    config: MeshConfig,
    place: chips.Topology,
    devices: list[Any],
) -> Report:
    others = list(changes(job, settings, config, len(devices)))
    reports: dict[int, Report] = {}

    def fits(index: int) -> bool:
        macros, changed = others[index]
        print(f"does not fit; compiling with {macros} ...", flush=True)
        reports[index] = examine(job, changed, place, devices)
        return reports[index].fits

    # Each needs less memory than the one before: bisect for the first that fits.
    first = bisect.bisect_left(range(len(others)), True, key=fits)
    # The change of the mesh overrides the proposed mesh.
    nearest = tuple(report.mesh_flags | macros for macros, _ in others[first : first + 1])
    return dataclasses.replace(
        report, nearest=nearest, nearest_report=reports.get(first), tried=len(reports)
    )
