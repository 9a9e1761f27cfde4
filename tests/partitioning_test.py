"""The mesh and its one rule table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from glimmer_jax import axes, partitioning
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch, spec
from tests.training.toy_model import batch_at


def test_every_axis_name_has_a_rule():
    constants = {value for key, value in vars(axes).items() if key.isupper()}
    names = {value for value in constants if isinstance(value, str)}
    assert names == set(partitioning.AXIS_RULES)


def test_a_mesh_takes_what_is_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, model=2))
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "passages": 1, "model": 2}
    assert make_mesh(MeshConfig(data=1, slice=2, fsdp=-1)).shape["fsdp"] == 4
    assert make_mesh(MeshConfig(), jax.devices()[:3]).size == 3


@pytest.mark.parametrize("sizes", [dict(data=0), dict(fsdp=-2), dict(data=-1, model=-1)])
def test_invalid_mesh_sizes_are_rejected(sizes):
    with pytest.raises(ValueError, match="MESH_.*positive.*one -1"):
        MeshConfig(**sizes)


@pytest.mark.parametrize("config", [MeshConfig(3), MeshConfig(-1, 3), MeshConfig(-1, 16)])
def test_a_mesh_that_does_not_cover_the_devices_is_rejected(config):
    with pytest.raises(ValueError, match="MESH_.*got 8.*product is 8"):
        make_mesh(config)


@pytest.mark.parametrize(
    ("sizes", "proposed"),
    [
        (dict(data=3), "data=8, fsdp=1, model=1; or data=4, fsdp=2, model=1"),
        (dict(data=-1, fsdp=3), "data=2, fsdp=4, model=1"),
        (dict(data=1, fsdp=16), "data=1, fsdp=8, model=1"),
        (dict(data=1, fsdp=8, slice=2), "slice=2, data=1, fsdp=4, model=1"),
        (dict(data=1, passages=6), "data=1, fsdp=1, passages=8, model=1"),
    ],
)
def test_the_message_proposes_the_nearest_meshes_that_fit(sizes, proposed):
    with pytest.raises(ValueError, match="for example") as info:
        make_mesh(MeshConfig(**sizes))
    assert str(info.value).split("for example ")[1].startswith(proposed)


@dataclasses.dataclass(frozen=True)
class TpuDevice:
    """A chip of a multi-slice job, as far as a mesh looks at it."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU of a test"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id // 2 % 2, self.id // 4, 0)


def test_slices_are_the_hardwares_and_lie_outermost():
    # Given out of order: devices of two slices alternate.
    devices = [TpuDevice(i, i % 2) for i in range(8)]
    mesh = make_mesh(MeshConfig(slice=2, data=1, fsdp=-1), devices)
    grid = mesh.devices.reshape(2, 4)
    assert [{device.slice_index for device in row} for row in grid] == [{0}, {1}]
    with pytest.raises(ValueError, match="MESH_SLICE=1.*2 slices.*Set MESH_SLICE=2"):
        make_mesh(MeshConfig(data=8), devices)


def test_rows_of_a_process_are_those_of_its_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, passages=2))
    np.testing.assert_array_equal(partitioning.own_rows(mesh, 8), np.arange(8))
    assert partitioning.parts(mesh.shape, axes.BATCH) == 4
    assert partitioning.parts(mesh.shape, axes.PASSAGES) == 2


def test_names_become_mesh_axes():
    assert spec((axes.EMBED, axes.MLP)) == PartitionSpec("fsdp", "model")
    rows = ("slice", "data", "fsdp")
    assert spec((axes.BATCH, None, axes.ACT_EMBED)) == PartitionSpec(rows, None, None)
    assert spec((axes.BATCH, partitioning.FREE))[1] is PartitionSpec.UNCONSTRAINED
    assert spec((axes.LAYERS, axes.HEADS, axes.RELPOS_BUCKETS)) == PartitionSpec(
        None, "model", None
    )


def test_an_unknown_name_is_rejected():
    with pytest.raises(ValueError, match="'width'.*no rule.*AXIS_RULES"):
        spec((axes.BATCH, "width"))


def test_two_dimensions_on_one_mesh_axis_are_rejected():
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' .*'model'"):
        spec((axes.HEADS, axes.MLP))


def test_constrain_needs_a_name_for_every_dimension():
    with pytest.raises(ValueError, match=r"\(2, 3\).*got 1"):
        partitioning.constrain(jnp.zeros((2, 3)), (axes.BATCH,))


def test_constrain_sets_the_sharding_only_inside_a_mesh():
    x = jnp.ones((8, 4))
    assert partitioning.constrain(x, (axes.BATCH, axes.ACT_MLP)) is x
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: partitioning.constrain(x * 2, (axes.BATCH, axes.ACT_MLP)))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 2)
    np.testing.assert_array_equal(y, 2.0)


def test_shardings_follow_the_tree_of_names():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    tree = partitioning.shardings({"a": (axes.VOCAB, axes.EMBED), "b": ()}, mesh)
    assert tree["a"].spec == PartitionSpec("model", "fsdp")
    assert tree["b"].spec == PartitionSpec()
    assert partitioning.batch_sharding(mesh).spec == PartitionSpec(("slice", "data", "fsdp"))
    assert partitioning.replicated(mesh).is_fully_replicated


def test_parameters_that_do_not_divide_are_all_reported():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=4))
    names = {"a": (axes.EMBED, axes.MLP), "b": (axes.EMBED,), "c": (axes.EMBED,)}
    shapes = {"a": jnp.zeros((4, 6)), "b": jnp.zeros((3,)), "c": jnp.zeros((2,))}
    with pytest.raises(ValueError, match=r"\['a'\] \(4, 6\) by 4 on model.*\['b'\].* by 2") as info:
        partitioning.check_divisible(shapes, names, mesh)
    assert "['c']" not in str(info.value)
    shapes = {"a": jnp.zeros((4, 8)), "b": jnp.zeros((4,)), "c": jnp.zeros((2,))}
    partitioning.check_divisible(shapes, names, mesh)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, model=2))


def test_rows_are_spread_and_ids_stay_on_the_host(mesh):
    batch = {**batch_at(0), "passage_memory": {"states": np.ones((16, 2, 3))}}
    placed = put_batch(batch, mesh)
    assert set(placed) == set(batch) - {"passage_ids"}
    for leaf in jax.tree.leaves(placed):
        assert leaf.sharding.is_equivalent_to(partitioning.batch_sharding(mesh), leaf.ndim)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_passages_are_spread_over_their_own_axis():
    mesh = make_mesh(MeshConfig(data=2, passages=4))
    batch = {"passage_memory": {"states": np.arange(96.0).reshape(4, 8, 3)}}
    states = put_batch(batch, mesh)["passage_memory"]["states"]
    assert states.sharding.shard_shape(states.shape) == (2, 2, 3)
    np.testing.assert_array_equal(states, batch["passage_memory"]["states"])


def test_rows_that_do_not_divide_are_rejected(mesh):
    with pytest.raises(ValueError, match=r"BATCH_SIZE.*8 .*4 x 2"):
        put_batch(batch_at(0, rows=12), mesh, num_microbatches=2)
