"""Alternative settings for a job that does not fit, from the smallest change to the largest."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from glimmer_jax import axes
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.t5 import REMAT_POLICIES
from glimmer_jax.partitioning import MeshConfig, parts
from glimmer_jax.preflight.programs import Settings

# Gin macros with their values, and the settings they result in.
Change = tuple[dict[str, Any], dict[str, Any]]


def changes(job: str, settings: Settings, mesh: MeshConfig, devices: int) -> Iterator[Change]:
    """Settings that need less memory per chip; `mesh` has no -1.

    Training: more recomputation, then smaller microbatches, then both with tensor parallelism.
    Answers: smaller batches, then tensor parallelism. Memory: smaller batches.
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
    """The same model with another remat policy."""
    return model.with_config(model.config.with_t5(remat_policy=policy))


def macros_of(now: MeshConfig, mesh: MeshConfig) -> dict[str, int]:
    """Gin macros that change the mesh from `now` to `mesh`; always with `data` and sizes above 1."""
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
    policies = list(REMAT_POLICIES)
    policies = policies[policies.index(now) + 1 :]
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
    """More tensor parallelism, from `fsdp` or `data`, as far as it divides the heads."""
    heads, wider = model.config.t5.num_heads, mesh
    axis = "fsdp" if mesh.fsdp > 1 else "data"
    while (size := getattr(wider, axis)) % 2 == 0 and heads % (wider.model * 2) == 0:
        wider = dataclasses.replace(wider, model=wider.model * 2, **{axis: size // 2})
        yield macros_of(mesh, wider), wider
