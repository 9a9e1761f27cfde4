"""Pages from the devices that hold them to the devices that want them.

Every device knows all wishes (they are integers), so each sender and each receiver finds out by
itself which page goes where, and only pages travel: in rounds of one all-to-all, in which a pair of
devices has room for twice its fair share. Wishes that are spread evenly take one round, so a device
receives at most twice what it asked for. Where many want the pages of few, there are more rounds:
slower, and nothing is dropped.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Room of a pair of devices in a round, as a multiple of the fair share.
_ROOM = 2


def exchange(pages: Mapping[str, jax.Array], wanted: jax.Array, mesh: Mesh) -> dict[str, jax.Array]:
    """`{name: pages[name][wanted]}`, to be called inside jit.

    Args:
      pages: integer arrays `[G, ...]`, G in equal, consecutive parts on all devices of `mesh`.
        Integers, because collectives that are made of sums may lose a bit of a float.
      wanted: int32 `[R]`, the same on every device; -1 for no page, which gives zeros.

    Returns:
      Arrays `[R, ...]`, in equal parts on all devices.
    """
    devices = mesh.size
    share = -(-len(wanted) // devices)
    padded = jnp.pad(wanted, (0, devices * share - len(wanted)), constant_values=-1)
    spread = PartitionSpec(mesh.axis_names)
    moved = jax.shard_map(
        lambda local, wanted: _on_device(local, wanted, mesh),
        mesh=mesh,
        in_specs=(spread, PartitionSpec()),
        out_specs=spread,
    )(dict(pages), padded.reshape(devices, share))
    return {name: x[: len(wanted)] for name, x in moved.items()}


def _on_device(local: dict[str, jax.Array], wanted_NR: jax.Array, mesh: Mesh):
    """One device's part; N devices, R wishes of each."""
    devices, share = wanted_NR.shape
    here = jax.lax.axis_index(mesh.axis_names)
    held = next(iter(local.values())).shape[0]
    room = max(1, min(share, -(-_ROOM * share // devices)))
    # Who has it; `devices` where nothing is wanted, which matches nobody.
    owner_NR = jnp.where(wanted_NR >= 0, wanted_NR // held, devices)

    # To send: the wishes that are mine, each with its place in the queue for its receiver.
    mine_NR = owner_NR == here
    turn_NR = jnp.cumsum(mine_NR, axis=1) - 1
    receiver_NR = jnp.broadcast_to(jnp.arange(devices)[:, None], wanted_NR.shape)
    # To receive: my wishes, each with its place in the queue of its sender.
    owner_R = owner_NR[here]
    from_RN = owner_R[:, None] == jnp.arange(devices)[None]
    turn_R = jnp.sum(jnp.where(from_RN, jnp.cumsum(from_RN, axis=0) - 1, 0), axis=1)
    # The longest queue of all, the same number on every device.
    queues_NN = jnp.zeros((devices, devices), jnp.int32)
    queues_NN = queues_NN.at[receiver_NR, owner_NR].add(1, mode="drop")
    rounds = -(-jnp.max(queues_NN) // room)

    def one_round(index, out):
        slot_NR = turn_NR - index * room
        slot_NR = jnp.where(mine_NR & (slot_NR >= 0), slot_NR, room)
        sent_NC = jnp.zeros((devices, room), jnp.int32)
        sent_NC = sent_NC.at[receiver_NR, slot_NR].set(wanted_NR - here * held, mode="drop")
        slot_R = turn_R - index * room
        now_R = (owner_R < devices) & (slot_R >= 0) & (slot_R < room)
        at_R = jnp.where(now_R, owner_R * room + slot_R, 0)
        for name, pages in local.items():
            got = jax.lax.all_to_all(pages[sent_NC], mesh.axis_names, 0, 0, tiled=True)
            got = got.reshape(devices * room, *pages.shape[1:])[at_R]
            now = now_R.reshape(share, *(1,) * (pages.ndim - 1))
            out = {**out, name: jnp.where(now, got, out[name])}
        return out

    varying = tuple(mesh.axis_names)
    empty = {
        name: jax.lax.pcast(jnp.zeros((share, *x.shape[1:]), x.dtype), varying, to="varying")
        for name, x in local.items()
    }
    return jax.lax.fori_loop(0, rounds, one_round, empty)
