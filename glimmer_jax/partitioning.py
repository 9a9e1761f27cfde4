"""The mesh, the rule table, and the shardings derived from it.

A dimension is named once, where its array is created (`axes`). The table maps names to mesh axes;
everything else is derived. Unknown names, and two dimensions of one array on the same mesh axis,
raise an error, so that nothing is replicated by accident.

Run jitted code inside `with jax.set_mesh(mesh):`. Without a mesh `constrain` returns its argument, as
single-device tests need.
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

# From the slowest network to the fastest: `slice` crosses the data centre, `model` is innermost.
MESH_AXES = ("slice", "data", "fsdp", "passages", "model")

# `slice`, `data` and `fsdp` all shard the batch: an fsdp device holds a shard of the parameters and a
# shard of the batch. Each slice holds all parameters, so only gradients cross slices. `passages`
# shards the passages of each question, for batches with fewer questions than devices. `model` is
# tensor parallelism: heads, feed-forward and vocabulary.
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

# Instead of a dimension's name in `constrain`: keeps the sharding that the compiler propagates.
FREE = PartitionSpec.UNCONSTRAINED

# Ids are for lookups and reports on the host; they are never sent to devices.
HOST_ONLY = ("passage_ids",)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, in devices. One of them may be -1: all remaining devices."""

    data: int = -1  # replicas of the parameters, each with its own shard of the batch
    fsdp: int = 1  # shards of every parameter, gathered where used; and of the batch
    model: int = 1  # shards of heads, feed-forward and vocabulary
    passages: int = 1  # shards of each question's passages; parameters are replicated
    slice: int = 1  # TPU slices, joined by the data centre's network; parameters are replicated

    def __post_init__(self):
        sizes = tuple(self.sizes().values())
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(
                f"MESH_* sizes must be positive, with at most one -1; got {_format(self.sizes())}."
            )

    def sizes(self) -> dict[str, int]:
        """Axis -> size, in the mesh's order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def filled(self, count: int) -> "MeshConfig":
        """With -1 replaced by the size that uses all of `count` devices."""
        known = math.prod(size for size in self.sizes().values() if size != -1)
        rest = max(count // known, 1)
        return MeshConfig(**{a: rest if size == -1 else size for a, size in self.sizes().items()})


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `MESH_AXES` over `devices` (default: all of them).

    Raises:
      ValueError: the product of the sizes is not the number of devices, or `slice` is not the
        number of slices that the devices belong to.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # On GPUs `slice_index` counts hosts, and any axis may span those.
        index = (device.platform == "tpu" and getattr(device, "slice_index", None)) or 0
        slices.setdefault(index, []).append(device)
    sizes = config.filled(len(devices)).sizes()
    if math.prod(sizes.values()) != len(devices):
        fitting = "; or ".join(_format(near) for near in nearest_sizes(config, len(devices)))
        raise ValueError(
            f"MESH_*: a mesh of {_format(sizes)} needs {math.prod(sizes.values())} devices, got "
            f"{len(devices)}. Choose sizes whose product is {len(devices)}, for example {fitting}."
        )
    if len(slices) > 1 and sizes["slice"] != len(slices):
        raise ValueError(
            f"MESH_SLICE={sizes['slice']}, and the devices belong to {len(slices)} slices: another "
            f"axis would cross the slow network between them. Set MESH_SLICE={len(slices)}."
        )
    # Auto axes: the compiler propagates shardings, and `constrain` pins them where it matters.
    types = (AxisType.Auto,) * len(MESH_AXES)

    def grid(axes: Sequence[str], devices: Sequence[Any]) -> np.ndarray:
        shape = tuple(sizes[axis] for axis in axes)
        # A TPU's torus may have fewer or longer sides than the mesh has axes.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)

    if len(slices) == 1:
        return Mesh(grid(MESH_AXES, devices), MESH_AXES, axis_types=types)
    grids = [grid(MESH_AXES[1:], slices[index]) for index in sorted(slices)]
    return Mesh(np.stack(grids), MESH_AXES, axis_types=types)


def nearest_sizes(config: MeshConfig, count: int, num_results: int = 2) -> list[dict[str, int]]:
    """Sizes for `count` devices that differ least from `config`'s; -1 matches any size."""
    wanted = config.sizes()

    def distance(sizes: dict[str, int]) -> tuple[float, ...]:
        # By ratio; slices first, since the hardware fixes them. Ties change the outermost axes.
        ratios = [abs(math.log(sizes[a] / wanted[a])) if wanted[a] > 0 else 0.0 for a in MESH_AXES]
        free = [sizes[a] for a in MESH_AXES if wanted[a] == -1]
        return (ratios[0], round(sum(ratios), 9), *(-size for size in free), *reversed(ratios))

    candidates = []
    for replicas in _factors(count):
        for fsdp in _factors(count // replicas):
            for passages in _factors(count // replicas // fsdp):
                model = count // replicas // fsdp // passages
                slices = wanted["slice"] if wanted["slice"] > 0 else 1
                slices = slices if replicas % slices == 0 else 1
                sizes = (slices, replicas // slices, fsdp, passages, model)
                candidates.append(dict(zip(MESH_AXES, sizes, strict=True)))
    return sorted(candidates, key=distance)[:num_results]


def _factors(number: int) -> list[int]:
    return [factor for factor in range(1, number + 1) if number % factor == 0]


def _format(sizes: Mapping[str, int]) -> str:
    # Unused axes are left out, except for the three common ones.
    used = {a: s for a, s in sizes.items() if s != 1 or a in ("data", "fsdp", "model")}
    return ", ".join(f"{axis}={size}" for axis, size in used.items())


def parts(sizes: Mapping[str, int], name: str) -> int:
    """Number of shards of a dimension called `name`, on a mesh of these sizes by axis."""
    return math.prod(sizes[axis] for axis in AXIS_RULES[name])


def parts_in_scope(name: str) -> int:
    """`parts` on the current mesh; 1 without a mesh, and inside a `shard_map` over all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.are_all_axes_manual else parts(mesh.shape, name)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices of the batch rows that this process holds, int `[n]`, ascending.

    Processes hold the same rows where an axis that does not shard the batch spans them.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    starts = {rows[0].indices(batch_size)[:2] for rows in held if rows}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(starts)])


def spec(names: Sequence[Any]) -> PartitionSpec:
    """The PartitionSpec of dimensions called `names`; None replicates, `FREE` leaves it open.

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
                f"Dimension {name!r} of an array with dimensions {tuple(names)} has no rule; rules "
                f"exist for {sorted(AXIS_RULES)}. Add it to partitioning.AXIS_RULES."
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


def without_fsdp(names: Sequence[Any]) -> list[Any]:
    """Dimension names of a parameter that is gathered along `fsdp`."""
    return [
        None if name is not None and "fsdp" in AXIS_RULES.get(name, ()) else name for name in names
    ]


def constrain(x: jax.Array, names: Sequence[Any]) -> jax.Array:
    """Constrains the sharding of an activation inside jit.

    Returns `x` without a mesh in scope, and inside a `shard_map` over all mesh axes.
    """
    if x.ndim != len(names):
        raise ValueError(
            f"constrain needs one name per dimension of shape {x.shape}; got {len(names)}: {names}."
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def gather_fsdp(tree: Any, names_tree: Any) -> Any:
    """Parameters gathered along `fsdp`, inside jit; for a program that uses each of them many times.

    Args:
      tree: parameters.
      names_tree: of the same structure; its leaves are tuples of dimension names.
    """
    return jax.tree.map(
        lambda names, leaf: constrain(leaf, without_fsdp(names)), names_tree, tree, is_leaf=is_names
    )


def is_names(leaf: Any) -> bool:
    """Whether this is a tuple of dimension names, in contrast to optax's tuples of states."""
    return type(leaf) is tuple and all(name is None or isinstance(name, str) for name in leaf)


def shardings(names_tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree whose leaves are tuples of dimension names."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names)),
        names_tree,
        is_leaf=is_names,
    )


def check_divisible(shapes_tree: Any, names_tree: Any, mesh: Mesh) -> None:
    """Rejects parameters that the mesh cannot shard evenly; the error lists all of them."""
    uneven = []

    def check(path, names, shape):
        for size, entry in zip(shape, spec(names), strict=True):
            mesh_axes = (entry,) if isinstance(entry, str) else (entry or ())
            shards = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % shards:
                uneven.append(f"{jax.tree_util.keystr(path)} {tuple(shape)} by {shards} on {entry}")

    jax.tree_util.tree_map_with_path(
        lambda path, names, leaf: check(path, names, leaf.shape),
        names_tree,
        shapes_tree,
        is_leaf=is_names,
    )
    if uneven:
        raise ValueError(
            f"MESH_*: the mesh {dict(mesh.shape)} cannot shard these parameters evenly: "
            f"{'; '.join(uneven)}. Change the mesh or the model's sizes."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `slice`, `data` and `fsdp`, other dimensions replicated."""
    return NamedSharding(mesh, spec((axes.BATCH,)))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Shardings of a batch `{name: array or dict of arrays}`: rows, and passages where present."""

    def of(name: str) -> NamedSharding:
        passages = name.startswith("passage_") or name == "gold_passages"
        return NamedSharding(mesh, spec((axes.BATCH, axes.PASSAGES) if passages else (axes.BATCH,)))

    return {name: jax.tree.map(lambda _, name=name: of(name), x) for name, x in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device; for scalars and random keys."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, Any], mesh: Mesh, num_microbatches: int = 1) -> dict[str, Any]:
    """This process's rows of a batch -> global arrays, rows and passages sharded over the mesh.

    Args:
      batch: the rows `own_rows` of each array, complete in every other dimension.
      mesh: the devices.
      num_microbatches: the rows must divide evenly into these as well.

    Raises:
      ValueError: the rows do not divide evenly over devices and microbatches.
    """
    batch = {name: value for name, value in batch.items() if name not in HOST_ONLY}
    ways = parts(mesh.shape, axes.BATCH)
    # Rows of the global batch per row of this process.
    scale = ways // len(own_rows(mesh, ways))
    rows = {np.shape(leaf)[0] * scale for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or min(rows) % (ways * num_microbatches):
        shapes = {name: np.shape(value) for name, value in batch.items() if hasattr(value, "shape")}
        raise ValueError(
            f"BATCH_SIZE: all arrays of a batch need the same number of rows, a multiple of "
            f"{ways * num_microbatches} (batch shards x microbatches = {ways} x "
            f"{num_microbatches}); got {shapes}. Change BATCH_SIZE, the mesh or NUM_MICROBATCHES."
        )
    own = own_rows(mesh, rows.pop())

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # allowed by JAX's types, never passed
            first, last, _ = index[0].indices(len(own) * scale)
            here = int(np.searchsorted(own, first))
            return leaf[(slice(here, here + last - first), *index[1:])]

        shape = (len(own) * scale, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch, batch_shardings(batch, mesh))
