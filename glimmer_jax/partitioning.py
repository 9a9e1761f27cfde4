"""Mesh, the one rule table, and the shardings that follow from it.

A dimension is named once, where the array is made (`axes`); the table says which mesh axes carry
that name; everything else is derived. A name that is not in the table, or two dimensions of one
array that would land on the same mesh axis, is an error: nothing is replicated by accident.

Run jitted code inside `with jax.set_mesh(mesh):`, or `constrain` has no mesh to speak of and leaves
arrays alone (which is what single-device tests want).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glimmer_jax import axes

MESH_AXES = ("data", "fsdp", "model")

# `batch` is spread over `data` and `fsdp` alike: an fsdp device holds a slice of the parameters and
# a slice of the batch. `model` is tensor parallelism: heads, feed-forward and vocabulary.
AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    axes.VOCAB: ("model",),
    axes.EMBED: ("fsdp",),
    axes.JOINED_KV: ("model",),
    axes.KV: (),
    axes.HEADS: ("model",),
    axes.MLP: ("model",),
    axes.RELPOS_BUCKETS: (),
    axes.LAYERS: (),
    **dict.fromkeys(axes.CODEBOOK, ()),
    axes.BATCH: ("data", "fsdp"),
    axes.PASSAGES: (),
    axes.LENGTH: (),
    axes.ACT_EMBED: (),
    axes.ACT_HEADS: ("model",),
    axes.ACT_KV: (),
    axes.ACT_MLP: ("model",),
    axes.ACT_VOCAB: ("model",),
    axes.MEMORY_ROWS: ("data", "fsdp", "model"),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, in devices. One of them may be -1: whatever is left."""

    data: int = -1  # copies of the parameters, each with its own slice of the batch
    fsdp: int = 1  # slices of every parameter, gathered where it is used
    model: int = 1  # slices of heads, feed-forward and vocabulary

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.model)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"Mesh sizes must be positive, with at most one -1; got data={self.data}, "
                f"fsdp={self.fsdp}, model={self.model}."
            )


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `model` over `devices` (default: all of them).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.model]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"A mesh of data x fsdp x model = {' x '.join(map(str, sizes))} needs "
            f"{math.prod(sizes)} devices, and there are {len(devices)}. Choose sizes whose product "
            f"is {len(devices)}, for example data={len(devices)}, fsdp=1, model=1."
        )
    # Auto axes: the compiler propagates shardings, and `constrain` pins them where it matters.
    return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are called `names`; None is not sharded.

    Raises:
      ValueError: a name is not in `AXIS_RULES`, or two dimensions claim one mesh axis.
    """
    entries: list[Any] = []
    owner: dict[str, str] = {}
    for name in names:
        if name is None:
            entries.append(None)
            continue
        if name not in AXIS_RULES:
            raise ValueError(
                f"Dimension {name!r} of an array with dimensions {tuple(names)} has no rule; the "
                f"table knows {sorted(AXIS_RULES)}. Add it to partitioning.AXIS_RULES."
            )
        mesh_axes = AXIS_RULES[name]
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ValueError(
                    f"Dimensions {owner[mesh_axis]!r} and {name!r} of an array with dimensions "
                    f"{tuple(names)} both map to mesh axis {mesh_axis!r}; rename one of them."
                )
            owner[mesh_axis] = name
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Pins the sharding of an activation inside jit; without a mesh in scope, returns `x`.

    So it does inside a `shard_map` over the whole mesh, where each device is on its own.
    """
    if x.ndim != len(names):
        raise ValueError(f"An array of shape {x.shape} was given {len(names)} names {names}.")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def shardings(names_tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree whose leaves are tuples of dimension names."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names)),
        names_tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def check_divisible(shapes_tree: Any, names_tree: Any, mesh: Mesh) -> None:
    """Refuses parameters that the mesh cannot split evenly, all of them named at once."""
    bad = []

    def check(path, names, shape):
        for size, entry in zip(shape, spec(names), strict=True):
            mesh_axes = (entry,) if isinstance(entry, str) else (entry or ())
            parts = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % parts:
                bad.append(f"{jax.tree_util.keystr(path)} {tuple(shape)} by {parts} on {entry}")

    jax.tree_util.tree_map_with_path(
        lambda path, names, leaf: check(path, names, leaf.shape),
        names_tree,
        shapes_tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    if bad:
        raise ValueError(
            "These parameters do not divide evenly over the mesh "
            f"{dict(mesh.shape)}: {'; '.join(bad)}. Change the mesh or the model's sizes."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over `data` and `fsdp`, the rest whole; for any batch array."""
    return NamedSharding(mesh, spec((axes.BATCH,)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device; for scalars and random keys."""
    return NamedSharding(mesh, PartitionSpec())
