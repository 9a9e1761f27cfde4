"""The memory on a mesh: one array of pages, sharded over all devices.

A passage occupies consecutive pages of `PAGE_TOKENS` tokens, so padding is less than one page per
passage, and a passage is located by its first page and its length. Every device holds an equal,
consecutive part of the pages (`load`).

`lookup` moves pages from the devices that hold them to the devices that request them (`exchange`). The
requested page numbers are replicated, so every device computes which pages it sends and receives, and
only pages travel: in rounds of one all-to-all, in which a pair of devices has room for twice its fair
share. Evenly distributed requests take one round. If many requests go to few devices, more rounds
follow, and no page is dropped.
"""

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax import axes, codecs, partitioning
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.runtime.progress import Progress

PAGE_TOKENS = 16

# While a table is loaded, this many threads each read this many rows at a time: few enough that the C
# library reuses their buffers. The part of a device is assembled in the host's RAM.
_LOAD_THREADS = 8
_LOAD_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Table:
    """All passages of a store.

    pages: the codec's arrays, `[G, page tokens, ...]`, G sharded over all devices.
    first_page, lengths: int32 `[n]`, of each row; replicated.
    """

    pages: dict[str, jax.Array]
    first_page: jax.Array
    lengths: jax.Array


jax.tree_util.register_dataclass(
    Table, data_fields=["pages", "first_page", "lengths"], meta_fields=[]
)


def _first_pages(lengths: np.ndarray, page_tokens: int) -> np.ndarray:
    """int64 `[n + 1]`: the first page of each row, and the number of pages."""
    return np.concatenate([[0], np.cumsum(-(-lengths.astype(np.int64) // page_tokens))])


def _num_pages(used: int, devices: int) -> int:
    return max(-(-used // devices), 1) * devices


def token_bytes(specs: Mapping[str, tuple[tuple[int, ...], Any]]) -> int:
    """Bytes of one token in a codec's arrays, `{name: (trailing shape, dtype)}`."""
    return sum(int(np.prod(trailing)) * np.dtype(d).itemsize for trailing, d in specs.values())


def bytes_per_device(store: MemoryStore, mesh: jax.sharding.Mesh, page_tokens: int) -> int:
    """Bytes that `load` puts on each device."""
    used = int(_first_pages(store.lengths, page_tokens)[-1])
    identity = store.manifest.identity
    specs = codecs.get(identity.codec).array_specs(identity.emb_dim)
    held = _num_pages(used, mesh.size) // mesh.size * page_tokens * token_bytes(specs)
    return held + 8 * len(store)


def load(store: MemoryStore, mesh: jax.sharding.Mesh, page_tokens: int = PAGE_TOKENS) -> Table:
    """Loads the store onto the mesh; each process reads only the parts of its own devices.

    Raises:
      ValueError: the store has too many pages.
      DamagedStore, OSError: as `MemoryStore.read`.
      StopRequested: a stop was requested.
    """
    first_page = _first_pages(store.lengths, page_tokens)
    if first_page[-1] >= 2**31:
        raise ValueError(
            f"The memory has {first_page[-1]} pages, but a table holds fewer than 2**31. Read the memory "
            "from disk (MEMORY_BYTES_PER_DEVICE = 0)."
        )
    total = _num_pages(int(first_page[-1]), mesh.size)
    sharding = NamedSharding(mesh, partitioning.spec((axes.MEMORY_ROWS,)))
    shards: dict[str, list[jax.Array]] = {}
    parts = sharding.addressable_devices_indices_map((total,))
    progress = Progress("load memory", total // mesh.size * len(parts), "pages")
    for device, index in parts.items():
        (rows,) = index or (slice(None),)
        begin, end, _ = rows.indices(total)
        part = _read_pages(store, first_page, begin, end, page_tokens, progress)
        for name, values in part.items():
            shards.setdefault(name, []).append(jax.device_put(values, device))
    pages: dict[str, jax.Array] = {
        name: jax.make_array_from_single_device_arrays(
            (total, *arrays[0].shape[1:]), sharding, arrays
        )
        for name, arrays in shards.items()
    }
    everywhere = partitioning.replicated(mesh)
    # An empty store gets one row of length 0, because indexing needs a row.
    first = first_page[:-1] if len(store) else np.zeros(1)
    lengths = store.lengths if len(store) else np.zeros(1)
    return Table(
        pages,
        jax.device_put(first.astype(np.int32), everywhere),
        jax.device_put(lengths.astype(np.int32), everywhere),
    )


def _read_pages(
    store: MemoryStore,
    first_page: np.ndarray,
    begin: int,
    end: int,
    page_tokens: int,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """Pages `[begin, end)`, `[end - begin, page_tokens, ...]`; zeros beyond the last passage."""
    identity = store.manifest.identity
    specs = codecs.get(identity.codec).array_specs(identity.emb_dim)
    tokens = (end - begin) * page_tokens
    out = {name: np.zeros((tokens, *trailing), dtype) for name, (trailing, dtype) in specs.items()}
    first_row = max(int(np.searchsorted(first_page, begin, side="right")) - 1, 0)
    last_row = min(int(np.searchsorted(first_page, end, side="left")), len(store))

    def read(start: int) -> int:
        stop = min(start + _LOAD_ROWS, last_row)
        for row, arrays in store.passages(start, stop):
            at = (int(first_page[row]) - begin) * page_tokens
            for name, values in arrays.items():
                # A passage at either end of the part may belong to it in part.
                mine = values[max(-at, 0) : max(tokens - at, 0)]
                out[name][max(at, 0) : max(at, 0) + len(mine)] = mine
        return int(min(first_page[stop], end) - max(first_page[start], begin))

    pool = concurrent.futures.ThreadPoolExecutor(_LOAD_THREADS, "load-memory")
    try:
        for pages in pool.map(read, range(first_row, last_row, _LOAD_ROWS)):
            STOP.poll()
            progress.advance(pages)
    finally:
        pool.shutdown(cancel_futures=True)
    return {name: x.reshape(end - begin, page_tokens, *x.shape[1:]) for name, x in out.items()}


def lookup(
    table: Table, rows_BK: jax.Array, *, length: int, mesh: jax.sharding.Mesh
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Memory of the passages at `rows_BK`; a pure function, jitted with the table as an argument.

    Args:
      table: the memory.
      rows_BK: int32 `[B, K]`, replicated; -1 for no passage.
      length: P.

    Returns:
      The codec's arrays `[B, K, P, ...]`, zero beyond each passage; int32 lengths `[B, K]`.
    """
    batch, num_passages = rows_BK.shape
    page_tokens = next(iter(table.pages.values())).shape[1]
    pages_a_row = -(-length // page_tokens)
    safe_BK = jnp.maximum(rows_BK, 0)
    lengths_BK = jnp.where(rows_BK >= 0, table.lengths[safe_BK], 0)
    steps = jnp.arange(pages_a_row, dtype=jnp.int32)[None, None]
    wanted = steps * page_tokens < lengths_BK[..., None]
    pages_BKG = jnp.where(wanted, table.first_page[safe_BK][..., None] + steps, -1)
    real_BKP = jnp.arange(length)[None, None] < lengths_BK[..., None]

    bits = {
        name: jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        for name, x in table.pages.items()
    }
    memory = {}
    for name, pages in exchange(bits, pages_BKG.reshape(-1), mesh).items():
        values = pages.reshape(batch, num_passages, -1, *pages.shape[2:])[:, :, :length]
        real = real_BKP.reshape(*real_BKP.shape, *(1,) * (values.ndim - 3))
        values = _like_batch(jnp.where(real, values, jnp.zeros((), values.dtype)), mesh)
        # A float again only on the device where it stays.
        memory[name] = jax.lax.bitcast_convert_type(values, table.pages[name].dtype)
    return memory, _like_batch(lengths_BK, mesh)


def _like_batch(x: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    names = (axes.BATCH, axes.PASSAGES)
    if any(
        size % partitioning.parts(mesh.shape, name)
        for size, name in zip(x.shape[:2], names, strict=True)
    ):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partitioning.spec(names)))


# Pages that a pair of devices can exchange in one round, as a multiple of their fair share.
_ROOM = 2


def exchange(pages: Mapping[str, jax.Array], wanted: jax.Array, mesh: Mesh) -> dict[str, jax.Array]:
    """`{name: pages[name][wanted]}`, called inside jit.

    Args:
      pages: integer arrays `[G, ...]`, G in equal, consecutive parts on all devices of `mesh`.
        Integers, because collectives implemented as sums may change bits of a float.
      wanted: int32 `[R]`, replicated; -1 for no page, which gives zeros.

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
    """The part of one device; N devices with R requests each."""
    devices, share = wanted_NR.shape
    here = jax.lax.axis_index(mesh.axis_names)
    held = next(iter(local.values())).shape[0]
    room = max(1, min(share, -(-_ROOM * share // devices)))
    # The device that holds the page; `devices`, which matches none, if no page is wanted.
    owner_NR = jnp.where(wanted_NR >= 0, wanted_NR // held, devices)

    # To send: requests for pages held here, each with its position in the queue of its receiver.
    mine_NR = owner_NR == here
    turn_NR = jnp.cumsum(mine_NR, axis=1) - 1
    receiver_NR = jnp.broadcast_to(jnp.arange(devices)[:, None], wanted_NR.shape)
    # To receive: own requests, each with its position in the queue of its sender.
    owner_R = owner_NR[here]
    from_RN = owner_R[:, None] == jnp.arange(devices)[None]
    turn_R = jnp.sum(jnp.where(from_RN, jnp.cumsum(from_RN, axis=0) - 1, 0), axis=1)
    # From the longest queue, which is the same number on every device.
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
