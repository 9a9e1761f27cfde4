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
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glimmer_jax import axes

# From the slowest network to the fastest: `slice` crosses the data centre, `model` stays next door.
MESH_AXES = ("slice", "data", "fsdp", "passages", "model")

# `batch` is spread over `slice`, `data` and `fsdp` alike: an fsdp device holds a part of the
# parameters and a part of the batch. Between slices only gradients travel, since parameters are whole
# in each. `passages` divides the passages of each question, where there are fewer questions than
# devices. `model` is tensor parallelism: heads, feed-forward and vocabulary.
AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    axes.VOCAB: ("model",),
    axes.EMBED: ("fsdp",),
    axes.JOINED_KV: ("model",),
    axes.KV: (),
    axes.HEADS: ("model",),
    axes.MLP: ("model",),
    axes.RELPOS_BUCKETS: (),
    axes.LAYERS: (),
    axes.CODEBOOK: (),
    axes.CODE: (),
    axes.CODE_CHANNEL: (),
    axes.BATCH: ("slice", "data", "fsdp"),
    axes.PASSAGES: ("passages",),
    axes.LENGTH: (),
    axes.ACT_EMBED: (),
    axes.ACT_HEADS: ("model",),
    axes.ACT_KV: (),
    axes.ACT_MLP: ("model",),
    axes.ACT_VOCAB: ("model",),
    axes.MEMORY_ROWS: MESH_AXES,
}

# In place of a dimension's name in `constrain`: as the arrays that it is made of lie.
FREE = PartitionSpec.UNCONSTRAINED

# Ids serve lookups and reports on the host; the model never sees them.
HOST_ONLY = ("passage_ids",)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, in devices. One of them may be -1: whatever is left."""

    data: int = -1  # copies of the parameters, each with its own part of the batch
    fsdp: int = 1  # parts of every parameter, gathered where it is used; and of the batch
    model: int = 1  # parts of heads, feed-forward and vocabulary
    passages: int = 1  # parts of each question's passages; parameters are whole on each
    slice: int = 1  # TPU slices, joined by the data centre's network; parameters are whole on each

    def __post_init__(self):
        sizes = tuple(self.sizes().values())
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"Mesh sizes must be positive, with at most one -1; got {_words(self.sizes())}."
            )

    def sizes(self) -> dict[str, int]:
        """Axis -> size, in the mesh's order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def filled(self, count: int) -> "MeshConfig":
        """With what -1 stands for where there are `count` devices."""
        known = math.prod(size for size in self.sizes().values() if size != -1)
        left = max(count // known, 1)
        return MeshConfig(**{a: left if size == -1 else size for a, size in self.sizes().items()})


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `MESH_AXES` over `devices` (default: all of them).

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `slice` is not the number of
        slices that the devices come in.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # GPUs count something else by this name: hosts, between which any axis may go.
        index = (device.platform == "tpu" and getattr(device, "slice_index", None)) or 0
        slices.setdefault(index, []).append(device)
    sizes = config.filled(len(devices)).sizes()
    if math.prod(sizes.values()) != len(devices):
        fitting = "; or ".join(_words(near) for near in nearest_sizes(config, len(devices)))
        raise ValueError(
            f"A mesh of {_words(sizes)} needs {math.prod(sizes.values())} devices, and there are "
            f"{len(devices)}. Choose sizes whose product is {len(devices)}, for example {fitting}."
        )
    if len(slices) > 1 and sizes["slice"] != len(slices):
        raise ValueError(
            f"The devices come in {len(slices)} slices, and the mesh has slice={sizes['slice']}: "
            f"another axis would cross the slow network between them. Set MESH_SLICE={len(slices)}."
        )
    # Auto axes: the compiler propagates shardings, and `constrain` pins them where it matters.
    types = (AxisType.Auto,) * len(MESH_AXES)

    def grid(axes: Sequence[str], devices: Sequence[Any]) -> np.ndarray:
        shape = tuple(sizes[axis] for axis in axes)
        # Split, where a TPU's torus has fewer or longer sides than the mesh has axes.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)

    if len(slices) == 1:
        return Mesh(grid(MESH_AXES, devices), MESH_AXES, axis_types=types)
    grids = [grid(MESH_AXES[1:], slices[index]) for index in sorted(slices)]
    return Mesh(np.stack(grids), MESH_AXES, axis_types=types)


def nearest_sizes(config: MeshConfig, count: int, at_most: int = 2) -> list[dict[str, int]]:
    """Sizes for `count` devices that differ least from those asked for; -1 is anything."""
    wanted = config.sizes()

    def distance(sizes: dict[str, int]) -> tuple[float, ...]:
        # By ratio, slices first: they are what the hardware has. Of equals, axes to the left change.
        apart = [abs(math.log(sizes[a] / wanted[a])) if wanted[a] > 0 else 0.0 for a in MESH_AXES]
        free = [sizes[a] for a in MESH_AXES if wanted[a] == -1]
        return (apart[0], round(sum(apart), 9), *(-size for size in free), *reversed(apart))

    found = []
    for left in _factors(count):
        for fsdp in _factors(count // left):
            for passages in _factors(count // left // fsdp):
                model = count // left // fsdp // passages
                slices = wanted["slice"] if wanted["slice"] > 0 else 1
                slices = slices if left % slices == 0 else 1
                sizes = (slices, left // slices, fsdp, passages, model)
                found.append(dict(zip(MESH_AXES, sizes, strict=True)))
    return sorted(found, key=distance)[:at_most]


def _factors(number: int) -> list[int]:
    return [factor for factor in range(1, number + 1) if number % factor == 0]


def _words(sizes: Mapping[str, int]) -> str:
    # An axis that is not used is not worth reading about, but for the common three.
    used = {a: s for a, s in sizes.items() if s != 1 or a in ("data", "fsdp", "model")}
    return ", ".join(f"{axis}={size}" for axis, size in used.items())


def parts(sizes: Mapping[str, int], name: str) -> int:
    """Into how many parts a dimension called `name` is cut on a mesh of these sizes, by axis."""
    return math.prod(sizes[axis] for axis in AXIS_RULES[name])


def parts_in_scope(name: str) -> int:
    """`parts` on the mesh that is set; 1 without one, and where each device is on its own."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.are_all_axes_manual else parts(mesh.shape, name)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process holds, int `[n]`, in order.

    Processes share rows where an axis that does not divide the batch crosses them.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = {rows[0].indices(batch_size)[:2] for rows in held if rows}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(starts)])


def spec(names: Sequence[Any]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are called `names`; None is whole, `FREE` open.

    Raises:
      ValueError: a name is not in `AXIS_RULES`, or two dimensions claim one mesh axis.
    """
    entries: list[Any] = []
    owner: dict[str, str] = {}
    for name in names:
        if name is None or name is FREE:
            entries.append(name)
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


def constrain(x: jax.Array, names: Sequence[Any]) -> jax.Array:
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
            cuts = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % cuts:
                bad.append(f"{jax.tree_util.keystr(path)} {tuple(shape)} by {cuts} on {entry}")

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
    """Rows over `slice`, `data` and `fsdp`, the rest whole; for any array of a batch."""
    return NamedSharding(mesh, spec((axes.BATCH,)))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Of each array of a batch, `{name: array or dict of arrays}`; passages are cut as rows are."""

    def of(name: str) -> NamedSharding:
        passages = name.startswith("passage_") or name == "gold_passages"
        return NamedSharding(mesh, spec((axes.BATCH, axes.PASSAGES) if passages else (axes.BATCH,)))

    return {name: jax.tree.map(lambda _, name=name: of(name), x) for name, x in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device; for scalars and random keys."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, Any], mesh: Mesh, num_microbatches: int = 1) -> dict[str, Any]:
    """This process's rows of a batch -> global arrays, rows and passages spread over the mesh.

    Args:
      batch: arrays of the rows `own_rows`, whole in every other dimension.
      mesh: the devices.
      num_microbatches: into which the rows must divide, too.

    Raises:
      ValueError: the rows do not divide evenly over devices and microbatches.
    """
    batch = {name: value for name, value in batch.items() if name not in HOST_ONLY}
    ways = parts(mesh.shape, axes.BATCH)
    # Rows of the whole batch for each one here.
    scale = ways // len(own_rows(mesh, ways))
    rows = {np.shape(leaf)[0] * scale for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or min(rows) % (ways * num_microbatches):
        shapes = {name: np.shape(value) for name, value in batch.items() if hasattr(value, "shape")}
        raise ValueError(
            f"A batch must have one number of rows, a multiple of {ways * num_microbatches} "
            f"(devices that share it x microbatches = {ways} x {num_microbatches}); got {shapes}. "
            "Change BATCH_SIZE, the mesh or num_microbatches."
        )
    own = own_rows(mesh, rows.pop())

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX's types allow for it; its callers do not
            first, last, _ = index[0].indices(len(own) * scale)
            here = int(np.searchsorted(own, first))
            return leaf[(slice(here, here + last - first), *index[1:])]

        shape = (len(own) * scale, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch, batch_shardings(batch, mesh))
