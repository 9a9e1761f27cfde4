"""Other settings of a job, from the smallest change to the largest, for one that does not fit."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from glimmer_jax import axes
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, parts
from glimmer_jax.preflight.programs import Settings

# Gin macros and their values, and the settings that they give.
Change = tuple[dict[str, Any], dict[str, Any]]
_POLICIES = ("none", "minimal", "full")


def changes(job: str, settings: Settings, mesh: MeshConfig, devices: int) -> Iterator[Change]:
    """Settings that need less memory on a chip; `mesh` has no -1.

    Training: more is computed again, then smaller parts of the batch, then both with tensor
    parallelism. Answers: fewer questions at a time, then tensor parallelism. Memory: fewer passages.
    """
    if job == "train":
        yield from _training(settings, mesh)
        return
    batch = settings["batch_size"]
    ways = 1 if job == "build_memory" else parts(mesh.sizes(), axes.BATCH)
    while batch % 2 == 0 and (batch // 2) % ways == 0:
        batch //= 2
        yield {"BATCH_SIZE": batch}, {**settings, "batch_size": batch, "mesh": mesh}
    if job != "build_memory":
        for macros, wider in _wider(mesh, settings["model"]):
            yield macros | {"BATCH_SIZE": batch}, {**settings, "batch_size": batch, "mesh": wider}


def with_remat(model: GlimmerModel, policy: str) -> GlimmerModel:
    """The same model with another policy of recomputation."""
    t5 = dataclasses.replace(model.config.t5, remat_policy=policy)
    config = dataclasses.replace(model.config, t5=t5)
    return GlimmerModel(config, model.loss, model.decode, eos_id=model.eos_id)


def macros_of(now: MeshConfig, mesh: MeshConfig) -> dict[str, int]:
    """Gin macros that make `mesh` of `now`; sizes above 1 are named in any case, and `data`."""
    return {
        f"MESH_{axis.upper()}": size
        for axis, size in mesh.sizes().items()
        if axis == "data" or size > 1 or size != now.sizes()[axis]
    }


def _training(settings: Settings, mesh: MeshConfig) -> Iterator[Change]:
    model, loop = settings["model"], settings["loop_config"]
    now = model.config.t5.remat_policy

    def change(policy: str, pieces: int, wider: MeshConfig, macros: dict[str, Any]) -> Change:
        given = dict(macros)
        if policy != now:
            given["REMAT_POLICY"] = policy
        if pieces != loop.num_microbatches:
            given["NUM_MICROBATCHES"] = pieces
        return given, {
            **settings,
            "model": with_remat(model, policy),
            "loop_config": dataclasses.replace(loop, num_microbatches=pieces),
            "mesh": wider,
        }

    rows = settings["batch_size"] // parts(mesh.sizes(), axes.BATCH)
    smaller = [n for n in range(loop.num_microbatches + 1, rows + 1) if rows % n == 0]
    policies = _POLICIES[_POLICIES.index(now) + 1 :]
    for policy in policies:
        yield change(policy, loop.num_microbatches, mesh, {})
    last = policies[-1] if policies else now
    for pieces in smaller:
        yield change(last, pieces, mesh, {})
    for macros, wider in _wider(mesh, model):
        rows = settings["batch_size"] // parts(wider.sizes(), axes.BATCH)
        if settings["batch_size"] % parts(wider.sizes(), axes.BATCH) == 0:
            yield change(last, rows, wider, macros)


def _wider(mesh: MeshConfig, model: GlimmerModel) -> Iterator[tuple[dict[str, Any], MeshConfig]]:
    """More tensor parallelism, taken from `fsdp`, as far as heads divide."""
    heads = model.config.t5.num_heads
    fsdp, width = mesh.fsdp, mesh.model
    while fsdp % 2 == 0 and heads % (width * 2) == 0:
        fsdp, width = fsdp // 2, width * 2
        wider = dataclasses.replace(mesh, fsdp=fsdp, model=width)
        yield macros_of(mesh, wider), wider
