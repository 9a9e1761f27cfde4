"""Collectives and loops read from the text of a program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import compiling, hlo
from glimmer_jax.preflight.report import Traffic

TEXT = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body.1 (state: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %gathered = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%part), replica_groups=[4,2]<=[8], dimensions={0}
  %scattered = f32[2,16]{1,0} reduce-scatter(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %next = (s32[], bf16[4,16]) tuple(%i, %x), backend_config={"estimated_cycles":"10"}
}

%condition.1 (state: (s32[], bf16[4,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%inner (x: f32[8]) -> f32[8] {
  ROOT %p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), PAIRS
}

%all-reduce-scatter.7 (w: bf16[16,8]) -> bf16[4,8] {
  %all = bf16[16,8]{1,0} all-reduce(%w), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %own = bf16[4,8]{1,0} dynamic-slice(%all, %i, %j)
}

%compare.2 (i: s32[], n: s32[]) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%condition.2 (state: (s32[], bf16[4])) -> pred[] {
  %length = s32[]{:T(128)} constant(32)
  ROOT %more = pred[] fusion(%i, %length), kind=kLoop, calls=%compare.2
}

%body.2 (state: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %step = bf16[4]{0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}, dimensions={0}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %loop = (s32[], bf16[4,16]) while(%s), condition=%condition.1, body=%body.1, backend_config=LAYERS
  %reduced = (f32[8]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %started = ((f32[4]{0}), (f32[8]{0})) all-gather-start(%z), replica_groups={}, dimensions={0}
  %summed = bf16[4,8]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.7
  %handed = (f32[2,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=2, MEGASCALE
  %handed-done = (f32[2,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%handed), channel_id=2, MEGASCALE
  %fed = (f32[64]{0}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true
  %decoded = (s32[], bf16[4]) while(%t), condition=%condition.2, body=%body.2
  %fused = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"7"}
  ROOT %out = f32[8]{0} copy(%x)
}
"""
for word, attribute in (
    ("PAIRS", "source_target_pairs={{0,1},{1,0}}"),
    ("LAYERS", '{"known_trip_count":{"n":"3"}}'),
    ("MEGASCALE", 'attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'),
):
    TEXT = TEXT.replace(word, attribute)


def test_collectives_have_kind_size_groups_and_number_of_runs():
    found = {(one.kind, one.size, one.times, one.in_loop) for one in hlo.collectives(TEXT)}
    assert found == {
        ("all-gather", 8 * 16 * 2, 3, True),
        ("reduce-scatter", 4 * 2 * 16 * 4, 3, True),
        ("all-reduce", 40, 1, False),
        ("all-gather", 32, 1, False),
        ("collective-permute", 32, 1, False),
        # A TPU's reduce-scatter, and a loop that ends when the answer does.
        ("reduce-scatter", 16 * 8 * 2, 1, False),
        ("all-to-all", 8, 32, True),
    }
    groups = {one.kind: one.groups for one in hlo.collectives(TEXT) if one.groups}
    assert groups["all-reduce"] == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert groups["reduce-scatter"] == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert groups["all-to-all"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups["collective-permute"] == ((0, 1), (1, 0))


def test_a_ring_moves_all_but_its_own_part():
    by_kind = {one.kind: one.moved(8) for one in hlo.collectives(TEXT) if one.groups}
    assert by_kind["all-gather"] == 3 * 8 * 16 * 2 // 2
    assert by_kind["all-reduce"] == 2 * 40 * 3 // 4
    assert by_kind["collective-permute"] == 32


def test_groups_join_devices_that_differ():
    ways = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    joins = {(one.kind, one.in_loop): one.joins(ways) for one in hlo.collectives(TEXT)}
    assert joins["all-gather", True] is False and joins["reduce-scatter", True] is True


def test_what_hosts_hand_over_came_from_other_slices():
    # An array that is there once, and none that a host makes by itself.
    assert hlo.from_other_slices(TEXT) == (1, 2 * 8 * 128 * 4)
    found, between = compiling.traffic(TEXT, make_mesh(MeshConfig(data=8)))
    assert found["through-hosts"] == Traffic(1, 8192) and between == 8192


def test_cycles_of_loops_are_counted_each_time():
    assert hlo.estimated_cycles(TEXT) == {"other": 3 * 10 + 7}
    assert hlo.estimated_cycles("ENTRY %main (x: f32[]) -> f32[] {\n}\n") == {}


@pytest.mark.parametrize(
    "op_name, part",
    [
        ("jit(step)/jvp(Glimmer)/Glimmer.decode/decoder/layers_11/mlp/wi_0/dot", "decoder/mlp/wi"),
        (
            "jit(step)/transpose(jvp(Glimmer))/Glimmer.read/live_encoder.last/live_b/while/body/"
            "closed_call/checkpoint/rematted_computation/layers/attention/dropout/Dropout_0/mul",
            "live_encoder/live_b/attention",
        ),
        ("jit(step)/jvp(Glimmer)/jit(take_along_axis)/gather", "other"),
        ("copy.7", "other"),
    ],
)
def test_cycles_count_for_the_part_of_the_model(op_name, part):
    named = f', metadata={{op_name="{op_name}"}}, backend_config={{"estimated_cycles":"7"}}'
    text = TEXT.replace(', backend_config={"estimated_cycles":"7"}', named)
    cycles = {part: 7, "other": 30} if part != "other" else {"other": 37}
    assert hlo.estimated_cycles(text) == cycles


def test_what_xla_writes_of_a_scan_is_understood():
    """Parameters gathered in each layer, as FSDP does, and a sum over devices in each."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, model=2))
    rows, columns = (jax.NamedSharding(mesh, P(*names)) for names in (("fsdp",), (None, "fsdp")))
    layers = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=columns)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)

    def run(x, layers):
        def layer(x, kernel):
            x = jax.lax.with_sharding_constraint(x @ kernel, rows)
            return x - jnp.mean(x, axis=0, keepdims=True), None

        return jax.lax.scan(layer, x, layers)[0]

    text = jax.jit(run, out_shardings=rows).lower(x, layers).compile().as_text()
    looped = {one.kind: one for one in hlo.collectives(text) if one.in_loop}
    assert looped["all-gather"].size == 16 * 16 * 4 and looped["all-gather"].times == 5
    assert looped["all-reduce"].times == 5 and len(looped["all-reduce"].groups[0]) == 4


STEPS_BY_TWO = """HloModule jit_windowed

%body (state: (bf16[8,16], u32[])) -> (bf16[8,16], u32[]) {
  %state = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=0
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %y = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"10"}
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="jit(f)/dot_general"}
  ROOT %out = (bf16[8,16]{1,0}, u32[]{:T(128)}) tuple(%y, /*index=1*/%next)
}

%condition (state: (bf16[8,16], u32[])) -> pred[] {
  %state = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %limit = u32[]{:T(128)} constant(LIMIT)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="jit(f)"}
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  ROOT %loop = (bf16[8,16]{1,0}, u32[]{:T(128)}) while(%t), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize("limit, trips", [(8, 4), (7, 4), (1, 1)])
def test_a_loop_runs_limit_over_step_times_rounded_up(limit, trips):
    text = STEPS_BY_TWO.replace("LIMIT", str(limit))
    assert hlo.estimated_cycles(text) == {"other": 10 * trips}


def test_custom_kernels_are_counted_in_loops():
    kernel = '%y = bf16[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"\n'
    text = re.sub(r"%y = .*\n", kernel, STEPS_BY_TWO.replace("LIMIT", "8"))
    assert hlo.custom_kernels(text) == 4 and not hlo.estimated_cycles(text)


DECODING = """HloModule jit_decode

%product (p0: bf16[16,16], p1: bf16[8,16]) -> bf16[8,16] {
  %p0 = bf16[16,16]{1,0} parameter(0)
  %cast = bf16[16,16]{1,0} fusion(%p0), kind=kLoop, calls=%cast
  %p1 = bf16[8,16]{1,0} parameter(1)
  ROOT %dot = bf16[8,16]{1,0} convolution(%p1, %cast), dim_labels=bf_io->bf
}

%cast (p0: bf16[16,16]) -> bf16[16,16] {
  %p0 = bf16[16,16]{1,0} parameter(0)
  ROOT %root = bf16[16,16]{1,0} bitcast(%p0)
}

%row (p0: bf16[99,16], p1: s32[]) -> bf16[1,16] {
  %p0 = bf16[99,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = bf16[1,16]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,16}
}

%body (state: STATE) -> STATE {
  %state = STATE parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %weights = bf16[16,16]{1,0} get-tuple-element(%state), index=1
  %embedding = bf16[99,16]{1,0} get-tuple-element(%state), index=2
  %pinned = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=3
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=4
  %unused = bf16[64,16]{1,0} get-tuple-element(%state), index=5
  %fetched = bf16[24,16]{1,0} get-tuple-element(%state), index=6
  %half = ((bf16[24,16]{1,0}), bf16[12,16]{1,0:S(1)}, s32[]) slice-start(%fetched), slice={[0:12], [0:16]}
  %token = bf16[1,16]{1,0} fusion(%embedding, %i), kind=kLoop, calls=%row
  %local = bf16[8,16]{1,0} convolution(%x, %pinned), dim_labels=bf_io->bf
  %y = bf16[8,16]{1,0} fusion(%weights, %x), kind=kOutput, calls=%product
  %next = s32[] add(%i, %one)
  ROOT %out = STATE tuple(%next, %weights, %embedding, %pinned, %y, /*index=5*/%unused, %fetched)
}

%condition (state: STATE) -> pred[] {
  %state = STATE parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  ROOT %loop = STATE while(%t), condition=%condition, body=%body
}
""".replace(
    "STATE", "(s32[], bf16[16,16], bf16[99,16], bf16[32,16], bf16[8,16], bf16[64,16], bf16[24,16])"
)


def test_a_loop_rereads_invariant_arrays_in_main_memory_only():
    # Not the embedding (a row per iteration), the array in on-chip memory, `x`, and the unused one.
    assert hlo.reread_bytes(DECODING) == (5 - 1) * (16 + 24) * 16 * 2
