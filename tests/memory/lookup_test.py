"""Memory on the mesh and on disk: the same bits, whatever the mesh."""

import collections
import functools
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from glimmer_jax import codecs, partitioning
from glimmer_jax.memory import edit, encoding, lookup, table
from glimmer_jax.memory.lookup import LookupConfig
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import StopRequested

ROWS = np.array([[0, 22, -1], [7, 7, 3], [-1, -1, -1], [21, 1, 13]])


def _mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    return partitioning.make_mesh(partitioning.MeshConfig(**sizes), jax.devices()[:count])


def _same(a, b):
    (memory_a, lengths_a), (memory_b, lengths_b) = a, b
    np.testing.assert_array_equal(np.asarray(lengths_a), np.asarray(lengths_b))
    assert memory_a.keys() == memory_b.keys()
    for name in memory_a:
        x, y = np.asarray(memory_a[name]), np.asarray(memory_b[name])
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize(
    "sizes",
    [dict(data=1), dict(data=8), dict(data=2, fsdp=2, model=2)],
    ids=["1", "8", "2x2x2"],
)
def test_mesh_and_disk_give_the_same_bits(tiny_store, sizes, monkeypatch):
    monkeypatch.setattr(table, "_LOAD_ROWS", 4)
    store = MemoryStore.open(tiny_store)
    for length, page_tokens in ((12, 4), (14, 5)):
        on_mesh = lookup.MeshLookup(store, _mesh(**sizes), length, page_tokens=page_tokens)
        disk = lookup.DiskLookup(store, length)
        _same(on_mesh(ROWS), disk(ROWS))
        _same(on_mesh(ROWS[:1]), disk(ROWS[:1]))


def test_two_hosts_share_one_table_and_answer_as_one(tiny_store, tmp_path):
    import two_hosts_job

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    job = [sys.executable, two_hosts_job.__file__, str(tiny_store), str(tmp_path), coordinator]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    processes = [subprocess.Popen([*job, str(i)], env=environment) for i in range(2)]
    try:
        assert [process.wait(timeout=280) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    store = MemoryStore.open(tiny_store)
    mesh = _mesh(data=1)
    tokens, scores = two_hosts_job.answers(store, lookup.DiskLookup(store, 12), mesh)
    for i in range(2):
        count, found = json.loads((tmp_path / str(i)).read_text())
        assert count == 2 and len(found) == 2 * len(two_hosts_job.MESHES)
        for got_tokens, got_scores in found:
            assert got_tokens == tokens
            np.testing.assert_allclose(got_scores, scores, rtol=1e-5)


def test_int8_memory_goes_the_same_ways(tiny, tmp_path):
    def encode(tokens):
        return encoding.encode_states("int8", tiny.encode_states(tokens))

    report = tiny.build_tiny(tmp_path / "s", encode=jax.jit(encode), codec="int8")
    assert 0 < report.manifest.codec_error["relative_rms"] < 0.01
    store = MemoryStore.open(tmp_path / "s")
    disk = lookup.DiskLookup(store, 12)(ROWS)
    assert {name: x.shape[3:] for name, x in disk[0].items()} == {
        "codes": (8,),
        "scale": (),
        "large": (4,),
        "places": (4,),
    }
    _same(lookup.MeshLookup(store, _mesh(data=2, model=2), 12, page_tokens=4)(ROWS), disk)


def test_absent_passages_are_zeros_of_length_zero(tiny_store):
    memory, lengths = lookup.MeshLookup(MemoryStore.open(tiny_store), _mesh(data=2), 12)(ROWS)
    assert (np.asarray(lengths)[ROWS < 0] == 0).all() and (np.asarray(lengths)[ROWS >= 0] > 0).all()
    assert not np.asarray(memory["states"])[ROWS < 0].view(np.uint16).any()


def test_negative_zero_survives_the_mesh(tiny, tmp_path):
    def encode(tokens):
        zeros = jax.numpy.zeros((*tokens.shape, tiny.EMB_DIM), jax.numpy.bfloat16)
        return {"states": -zeros}, np.ones(tokens.shape, bool)

    tiny.build_tiny(tmp_path / "s", encode=encode, reference=None)
    store = MemoryStore.open(tmp_path / "s")
    _same(lookup.MeshLookup(store, _mesh(data=4), 12)(ROWS), lookup.DiskLookup(store, 12)(ROWS))


def test_table_is_sharded_and_an_argument(tiny_store):
    mesh = _mesh(data=2, model=4)
    on_mesh = lookup.MeshLookup(MemoryStore.open(tiny_store), mesh, 12, page_tokens=4)
    pages = on_mesh.table.pages["states"]
    assert {shard.data.shape[0] for shard in pages.addressable_shards} == {pages.shape[0] // 8}
    jaxpr = jax.make_jaxpr(lambda t, r: table.lookup(t, r, length=12, mesh=mesh))(
        on_mesh.table, ROWS
    )
    assert not [const for const in jaxpr.consts if getattr(const, "nbytes", 0) > 100]


@pytest.mark.parametrize("popular", [range(23), [7], [22, 0, 0, 0]], ids=["even", "one", "skewed"])
def test_popular_passages_are_never_dropped(tiny_store, popular):
    store = MemoryStore.open(tiny_store)
    rows = np.random.default_rng(0).choice(popular, (16, 5))
    on_mesh = lookup.MeshLookup(store, _mesh(data=4, model=2), 12, page_tokens=4)
    _same(on_mesh(rows), lookup.DiskLookup(store, 12)(rows))
    # 7 passages of 3 pages each do not divide over 8 devices.
    _same(on_mesh(rows[:1]), lookup.DiskLookup(store, 12)(rows[:1]))


_COLLECTIVE = re.compile(
    r" = (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)\("
)


def _moved_bytes(text):
    """Bytes that a device receives in each collective of a compiled program, by kind."""
    moved = collections.Counter()
    for shapes, kind in _COLLECTIVE.findall(text):
        for dtype, dims in re.findall(r"([a-z]+[0-9]+)\[([0-9,]*)\]", shapes):
            count = math.prod(int(size) for size in dims.split(",") if size)
            moved[kind] += count * int(dtype.strip("abcdefghijklmnopqrstuvwxyz")) // 8
    return moved


@pytest.mark.parametrize("codec", ["bf16", "int8", "pq"])
@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=4, fsdp=2)], ids=["8", "4x2"])
def test_a_device_receives_at_most_twice_its_part_of_the_batch(sizes, codec):
    batch, passages, length, emb_dim, page = 16, 10, 64, 32, 16
    specs = codecs.get(codec).array_specs(emb_dim)
    mesh = _mesh(**sizes)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    whole = partitioning.replicated(mesh)
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    memory = table.Table(
        {
            name: jax.ShapeDtypeStruct((800, page, *trailing), dtype, sharding=spread)
            for name, (trailing, dtype) in specs.items()
        },
        shape((200,), "int32"),
        shape((200,), "int32"),
    )
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(table.lookup, length=length, mesh=mesh))
        compiled = run.lower(memory, shape((batch, passages), "int32")).compile()
    token = sum(math.prod(trailing) * dtype.itemsize for trailing, dtype in specs.values())
    part = batch * passages * length * token // 8
    moved = _moved_bytes(compiled.as_text())
    assert part <= moved["all-to-all"] <= 2 * part
    page_numbers = 4 * batch * passages * length // page
    assert sum(moved.values()) - moved["all-to-all"] <= page_numbers
    found, _ = compiled.output_shardings
    for name, (trailing, _) in specs.items():
        wanted = partitioning.batch_sharding(mesh)
        assert found[name].is_equivalent_to(wanted, 3 + len(trailing))


@pytest.mark.fault
@pytest.mark.parametrize("count", [0, 1])
def test_more_devices_than_passages(tiny, tmp_path, count):
    tiny.build_tiny(tmp_path / "s", tiny.TinyPassages(count=count))
    store = MemoryStore.open(tmp_path / "s")
    rows = np.array([[count - 1, -1]])
    _same(lookup.MeshLookup(store, _mesh(data=8), 12)(rows), lookup.DiskLookup(store, 12)(rows))


def test_prefetch_adds_memory_to_every_batch_in_order(tiny, tiny_store):
    ids = tiny.TinyPassages().ids
    batches = [{"passage_ids": ids[[[i, i + 1]]], "n": i} for i in range(5)]
    store = MemoryStore.open(tiny_store)
    disk = lookup.DiskLookup(store, 12)
    found = list(disk.prefetch(iter(batches)))
    assert [batch["n"] for batch in found] == list(range(5))
    for i, batch in enumerate(found):
        _same((batch["passage_memory"], batch["passage_lengths"]), disk(np.array([[i, i + 1]])))
    on_mesh = list(lookup.MeshLookup(store, _mesh(data=1), 12).prefetch(batches[:1]))
    _same((on_mesh[0]["passage_memory"], on_mesh[0]["passage_lengths"]), disk(np.array([[0, 1]])))


def test_prefetch_raises_what_the_read_raised_and_can_be_left(tiny_store):
    disk = lookup.DiskLookup(MemoryStore.open(tiny_store), 12)
    batches = [{"passage_ids": np.array([[-1]])}, {"passage_ids": np.array([[5]])}]
    stream = disk.prefetch(batches)
    next(stream)
    with pytest.raises(ValueError, match="not in the memory store"):
        next(stream)
    left = disk.prefetch(batches)
    next(left)
    left.close()


def test_unknown_ids_are_masked_and_counted_by_setting(tiny, tiny_store):
    ids = np.array([[tiny.TinyPassages().ids[2], 5, -1]])
    disk = lookup.DiskLookup(MemoryStore.open(tiny_store), 12, unknown="mask")
    batch = disk.add({"passage_ids": ids})
    assert (batch["passage_lengths"] > 0).tolist() == [[True, False, False]] and disk.masked == 1


def test_lengths_and_rows_out_of_range_are_rejected(tiny_store):
    store = MemoryStore.open(tiny_store)
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS .*11 .*12"):
        lookup.DiskLookup(store, 11)
    with pytest.raises(ValueError, match="-1 .*22.*23"):
        lookup.MeshLookup(store, _mesh(data=1), 12)(np.array([[23]]))


def test_home_is_chosen_by_bytes(tiny_store):
    store, mesh = MemoryStore.open(tiny_store), _mesh(data=2)
    need = table.bytes_per_device(store, mesh, table.PAGE_TOKENS)
    assert isinstance(lookup.open_lookup(store, mesh, 12, LookupConfig(need)), lookup.MeshLookup)
    assert isinstance(
        lookup.open_lookup(store, mesh, 12, LookupConfig(need - 1)), lookup.DiskLookup
    )
    placed = lookup.MeshLookup(store, mesh, 12).table
    on_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert on_device == need


@pytest.mark.parametrize("kind", ["mesh", "disk"])
def test_a_reopened_lookup_is_another_one_only_for_another_version(copied_store, kind, monkeypatch):
    store, mesh = MemoryStore.open(copied_store), _mesh(data=2)
    need = table.bytes_per_device(store, mesh, table.PAGE_TOKENS)
    first = lookup.open_lookup(store, mesh, 12, LookupConfig(need if kind == "mesh" else 0))
    assert first.reopened() is first
    edit.withdraw(copied_store, [int(store.ids[7])])
    second = first.reopened()
    assert type(second) is type(first) and second is not first
    _same(second(np.array([[0, 9]])), first(np.array([[0, 9]])))
    with pytest.raises(ValueError, match=str(store.ids[7])):
        second.rows(np.array([store.ids[7]]))
    if kind == "mesh":  # A version that has outgrown the devices stays on disk.
        monkeypatch.setattr(table, "bytes_per_device", lambda *_: need + 1)
        assert isinstance(first.reopened(), lookup.DiskLookup)


def test_loading_a_table_can_be_stopped(tiny_store, monkeypatch):
    polls = []

    def poll():
        polls.append(len(polls))
        if len(polls) == 3:
            raise StopRequested("stop")

    monkeypatch.setattr(table, "_LOAD_ROWS", 2)
    monkeypatch.setattr(table.STOP, "poll", poll)
    with pytest.raises(StopRequested):
        table.load(MemoryStore.open(tiny_store), _mesh(data=1))
    assert len(polls) == 3


def test_too_many_pages_are_rejected(tiny_store, monkeypatch):
    monkeypatch.setattr(table, "_first_pages", lambda *args: np.array([0, 2**31]))
    with pytest.raises(ValueError, match=r"pages, .*2\*\*31.*MEMORY_BYTES_PER_DEVICE"):
        table.load(MemoryStore.open(tiny_store), _mesh(data=1))
