"""What needs no TPU compiler: topologies, FLOPs, bytes, other settings, the report."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import preflight_table
from glimmer_jax.models.cost import question_cost
from glimmer_jax.modes import preflight as mode
from glimmer_jax.modes.preflight import mesh_for
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import chips, compiling, nearest, programs
from glimmer_jax.preflight.flops import count_flops
from glimmer_jax.preflight.report import Report, Traffic
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig
from tests.models import tiny

LENGTHS = {"inputs": 4, "targets": 5, "passages": (8, 6)}
SETTINGS = {
    "model": tiny.model(tiny.GLIMMER, tiny.LIGHT_LOSS),
    "batch_size": 8,
    "task_feature_lengths": LENGTHS,
    "loop_config": TrainConfig(total_steps=5),
    "optimizer": OptimizerConfig(min_dim_size_to_factor=1),
    "mesh": MeshConfig(),
    "max_length": 6,
}


def test_a_topology_is_a_generation_and_its_sides():
    place = chips.parse_topology("v5p:4x4x8", slices=2)
    assert (place.chips, place.name, place.chip.hbm_bytes) == (256, "v5p:4x4x8", 95 * 2**30)
    assert set(chips.CHIPS) == {"v4", "v5e", "v5p", "v6e", "tpu7x"}
    for text in ("v5p", "v5p:", "v9:4x4", "v5p:4x0x4", "v5p:4x4x"):
        with pytest.raises(ValueError, match="--topology.*v4, v5e.*v5p:4x4x4"):
            chips.parse_topology(text)
    with pytest.raises(ValueError, match=r"--topology.*3 sides.*2.*v5p:4x4x4"):
        chips.parse_topology("v5p:4x4")


def test_flops_count_every_layer_of_a_scan_and_every_turn_of_a_loop():
    def scanned(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    def looped(x, w):
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ w, x)

    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    assert count_flops(jax.make_jaxpr(scanned)(x, w)) == 7 * 2 * 3 * 4 * 4
    assert count_flops(jax.make_jaxpr(jax.jit(looped))(x, w), while_trips=5) == 5 * 2 * 3 * 4 * 4
    mapped = jax.shard_map(
        lambda x: x @ x,
        mesh=make_mesh(MeshConfig(data=2), jax.devices()[:2]),
        in_specs=jax.P(("data",)),
        out_specs=jax.P(("data",)),
    )
    assert count_flops(jax.make_jaxpr(mapped)(jnp.ones((8, 4)))) == 2 * 2 * 4 * 4 * 4


def test_flops_of_a_choice_by_platform_are_those_of_the_default():
    def padded_on_tpus(x, w):
        padded = lambda x, w: (jnp.pad(x, [(0, 1), (0, 0)]) @ w)[:1]  # noqa: E731
        return jax.lax.platform_dependent(x, w, tpu=padded, default=jnp.matmul)

    jaxpr = jax.make_jaxpr(padded_on_tpus)(jnp.ones((1, 4)), jnp.ones((4, 5)))
    assert count_flops(jaxpr) == 2 * 4 * 5


def test_flops_of_an_answer_are_those_of_the_papers_and_attentions_own():
    mesh, flops = make_mesh(MeshConfig(data=8)), {}
    for config in (tiny.FID, tiny.LUMEN, tiny.GLIMMER):
        settings = {**SETTINGS, "model": tiny.model(config)}
        settings |= {"memory_dir": "m"} if config.memory_layers else {}
        flops[config] = compiling.flops_of(programs.answer(settings, mesh), mesh)
    for config in (tiny.FID, tiny.LUMEN):
        cost = question_cost(config, passages=8, question=4, passage=6, answer=5)
        papers = 2 * 8 * cost.total
        # The papers leave out attention's own products, the output layer and the score.
        assert papers < flops[config] < 2 * papers
    # GLIMMER computes only the scored token of its last reranking layer; the papers count all
    # tokens.
    assert flops[tiny.GLIMMER] < flops[tiny.LUMEN] < flops[tiny.FID]


def test_answers_are_compiled_as_they_are_served():
    mesh = make_mesh(MeshConfig(data=8))
    t5 = dataclasses.replace(tiny.T5, dtype="bfloat16")
    model = tiny.model(dataclasses.replace(tiny.GLIMMER, t5=t5))
    params = programs.answer({**SETTINGS, "model": model}, mesh).arguments[0]
    assert params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("memory_dir", [None, "m"])
def test_an_answer_counts_both_programs_of_serving(memory_dir, monkeypatch):
    pairs, in_sequence = [], compiling.in_sequence
    monkeypatch.setattr(
        compiling, "in_sequence", lambda *pair: pairs.append(pair) or in_sequence(*pair)
    )
    mesh = make_mesh(MeshConfig(data=8))
    settings = {**SETTINGS, "memory_dir": memory_dir}
    read = programs.answer(settings, mesh)
    assert {"decoder_input_tokens", "decoder_target_tokens"}.isdisjoint(read.arguments[1])
    both = compiling.compile_program(read, mesh)
    alone = compiling.compile_program(dataclasses.replace(read, then=None), mesh)
    assert both.flops == compiling.flops_of(read, mesh) > alone.flops > 0
    assert both.memory_traffic > alone.memory_traffic
    kinds = dict(both.bytes_per_device)
    assert kinds.pop("total") == sum(kinds.values())
    # One question per device: bfloat16 or float32 states of the kept passages, and their mask.
    config, lengths = SETTINGS["model"].config, SETTINGS["task_feature_lengths"]
    kept, passage = config.num_kept or lengths["passages"][0], lengths["passages"][1]
    tokens = kept * (passage + lengths["inputs"])
    assert kinds["encoded"] == tokens * (4 * config.t5.emb_dim + 1)
    # Results are an argument of the second program, and not counted twice.
    ((first, second),) = pairs
    assert first == alone and first.returned >= kinds["encoded"]
    assert kinds["activations"] == max(
        first.bytes_per_device["activations"] - first.returned,
        second.bytes_per_device["activations"],
    )


def test_programs_in_sequence_add_work_and_share_memory():
    moved = {"all-gather": compiling.Traffic(2, 10)}
    first = compiling.Compiled(
        {"table": 5, "activations": 9, "total": 14}, 3, 100, moved, 1, 50, {"a": 4, "b": 3}, 0
    )
    second = compiling.Compiled(
        {"batch": 2, "activations": 4, "total": 6}, 1, 10, moved, 0, 5, {"b": 2}, 1
    )
    both = compiling.in_sequence(first, second)
    assert both.bytes_per_device == {"table": 5, "batch": 2, "activations": 6, "total": 13}
    assert (both.flops, both.memory_traffic, both.kernels) == (110, 55, 1)
    assert both.cycles == {"a": 4, "b": 5}
    assert both.traffic == {"all-gather": compiling.Traffic(4, 20)} and both.between_slices == 1
    rejected = dataclasses.replace(second, why_not="no room", traffic={}, cycles={})
    both = compiling.in_sequence(first, rejected)
    # The traffic and the cycles of one alone would mislead.
    assert both.why_not == "no room" and both.traffic == {} and both.cycles == {}


def test_recomputing_costs_flops():
    mesh = make_mesh(MeshConfig(data=8))
    plain = compiling.flops_of(programs.train(SETTINGS, mesh), mesh)
    full = {**SETTINGS, "model": nearest.with_remat(SETTINGS["model"], "full")}
    assert 1.2 * plain < compiling.flops_of(programs.train(full, mesh), mesh) < 1.4 * plain


@pytest.mark.parametrize("job", programs.JOBS)
def test_bytes_on_a_device_are_those_of_the_arrays(job):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    program = programs.JOBS[job](SETTINGS, mesh)
    given = program.bytes_by_kind()
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
        compiled = lowered.compile(compiler_options=tiny.QUICK)
    counted, seen = sum(given.values()), compiled.memory_analysis().argument_size_in_bytes
    # Arguments that a program does not look at are left out by the compiler: the decoder, when
    # reading, and all but the memory encoder, when building.
    assert seen - 64 <= counted and (job != "train" or counted < 1.02 * seen)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.params(tiny.GLIMMER)))
    assert (
        given["parameters"] == whole if job == "build_memory" else given["parameters"] < whole / 2
    )


HBM = 16 * 2**30


def test_training_without_a_mesh_uses_fsdp_and_surplus_on_passages():
    assert mesh_for("train", SETTINGS, 8, HBM) == MeshConfig(data=1, fsdp=8)
    assert mesh_for("train", SETTINGS, 32, HBM) == MeshConfig(data=1, fsdp=8, passages=4)
    two = {**SETTINGS, "mesh": MeshConfig(slice=2)}
    assert mesh_for("train", two, 8, HBM) == MeshConfig(data=1, fsdp=4, slice=2)
    given = {**SETTINGS, "mesh": MeshConfig(data=-1, model=2)}
    assert mesh_for("train", given, 8, HBM) == MeshConfig(data=4, model=2)
    assert mesh_for("build_memory", SETTINGS, 8, HBM) == MeshConfig()


@pytest.mark.parametrize("job", ["eval", "infer"])
def test_answering_without_a_mesh_never_shards_over_fsdp(job):
    # 8 questions of 8 passages, 4 heads.
    assert mesh_for(job, SETTINGS, 8, HBM) == MeshConfig(data=8)
    assert mesh_for(job, SETTINGS, 32, HBM) == MeshConfig(data=8, passages=4)
    assert mesh_for(job, {**SETTINGS, "batch_size": 1}, 4, HBM) == MeshConfig(data=1, passages=4)
    three = {**SETTINGS, "batch_size": 1, "task_feature_lengths": dict(LENGTHS, passages=(3, 6))}
    assert mesh_for(job, three, 4, HBM) == MeshConfig(data=1, model=4)
    two = {**SETTINGS, "mesh": MeshConfig(slice=2)}
    assert mesh_for(job, two, 8, HBM) == MeshConfig(data=4, slice=2)
    # Parameters that take more than half of the memory are sharded over `model`.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.params(tiny.GLIMMER)))
    assert mesh_for(job, SETTINGS, 8, 2 * size) == MeshConfig(data=8)
    assert mesh_for(job, SETTINGS, 8, size) == MeshConfig(data=4, model=2)
    assert mesh_for(job, SETTINGS, 8, size // 2) == MeshConfig(data=2, model=4)
    table = {**SETTINGS, "memory_bytes_per_device": size // 2}
    assert mesh_for(job, table, 8, 2 * size) == MeshConfig(data=4, model=2)
    # More than half of the memory, and room for the parameters in what remains.
    table = {**SETTINGS, "memory_bytes_per_device": 5 * size // 2}
    assert mesh_for(job, table, 8, 9 * size // 2) == MeshConfig(data=8)


def test_a_chosen_mesh_is_printed_as_flags_of_the_job():
    two = {**SETTINGS, "mesh": MeshConfig(slice=2)}
    for job, settings, count, flags in (
        ("train", SETTINGS, 8, {"MESH_DATA": 1, "MESH_FSDP": 8}),
        ("infer", SETTINGS, 32, {"MESH_DATA": 8, "MESH_PASSAGES": 4}),
        ("train", two, 8, {"MESH_DATA": 1, "MESH_FSDP": 4, "MESH_SLICE": 2}),
    ):
        chosen = mesh_for(job, settings, count, HBM)
        assert mode.mesh_flags(job, settings, chosen) == flags
        # With these flags the job gets this mesh, and the report no longer mentions it.
        sizes = {name.removeprefix("MESH_").lower(): size for name, size in flags.items()}
        given = {**settings, "mesh": MeshConfig(**sizes)}
        assert mesh_for(job, given, count, HBM) == chosen
        assert mode.mesh_flags(job, given, chosen) == {}
    assert mode.mesh_flags("build_memory", SETTINGS, MeshConfig()) == {}


def test_flags_of_the_mesh_are_part_of_the_nearest_settings(monkeypatch):
    def fits_from(first):
        def examine(job, settings, place, devices):
            return dataclasses.replace(REPORT, fits=first(settings))

        monkeypatch.setattr(mode, "examine", examine)
        flags = {"MESH_DATA": 1, "MESH_FSDP": 2}
        report = dataclasses.replace(REPORT, mesh_flags=flags)
        given = ("train", SETTINGS, MeshConfig(1, 2), None, [None] * 2)
        return dataclasses.asdict(mode._with_nearest(report, *given))

    found = fits_from(lambda settings: True)
    assert found["nearest"] == ({"MESH_DATA": 1, "MESH_FSDP": 2, "REMAT_POLICY": "minimal"},)
    # The table has a column for the mesh.
    assert preflight_table.changed(found) == {"REMAT_POLICY": "minimal"}
    found = fits_from(lambda settings: settings["mesh"].model == 2)
    (wider,) = found["nearest"]
    assert (wider["MESH_DATA"], wider["MESH_FSDP"], wider["MESH_MODEL"]) == (1, 1, 2)
    assert preflight_table.changed(found)["MESH_MODEL"] == 2
    assert "MESH_DATA" not in preflight_table.changed(found)


def test_nearest_settings_start_with_remat_and_end_with_model_axis():
    found = [macros for macros, _ in nearest.changes("train", SETTINGS, MeshConfig(1, 4), 4)]
    assert found[:3] == [
        {"REMAT_POLICY": "minimal"},
        {"REMAT_POLICY": "full"},
        {"REMAT_POLICY": "full", "NUM_MICROBATCHES": 2},
    ]
    assert found[3]["MESH_MODEL"] == 2 and found[3]["MESH_FSDP"] == 2
    _, changed = next(iter(nearest.changes("train", SETTINGS, MeshConfig(1, 4), 4)))
    assert changed["model"].config.t5.remat_policy == "minimal"
    assert changed["model"].loss == SETTINGS["model"].loss
    fewer = [macros for macros, _ in nearest.changes("infer", SETTINGS, MeshConfig(1, 2), 2)]
    assert fewer[:2] == [{"BATCH_SIZE": 4}, {"BATCH_SIZE": 2}]
    assert [m for m, _ in nearest.changes("build_memory", SETTINGS, MeshConfig(), 8)][-1] == {
        "BATCH_SIZE": 1
    }


def test_out_of_memory_errors_report_the_required_bytes():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 41.50G of 15.75G hbm. Exceeded hbm capacity by 25.75G."
    )
    used, words = compiling.no_room(message, given=7)
    assert used == round(41.5 * 2**30) and words == "Used 41.50G of 15.75G hbm"
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(532.51G) exceeds available HBM (15.75G)."
    )
    used, words = compiling.no_room(message, given=7)
    assert used == round(532.51 * 2**30) + 7 and words.startswith(
        "HLO temporaries (532.51G) exceeds"
    )
    assert compiling.no_room("INTERNAL: something else", given=7) is None


@pytest.mark.parametrize("pieces", [1, 4, 16, 99])
def test_the_nearest_settings_that_fit_are_found_in_few_compilations(monkeypatch, pieces):
    compiled = []

    def examine(job, settings, place, devices):
        compiled.append(settings["loop_config"].num_microbatches)
        return dataclasses.replace(REPORT, fits=compiled[-1] >= pieces)

    monkeypatch.setattr(mode, "examine", examine)
    settings = {**SETTINGS, "batch_size": 32}
    given = ("train", settings, MeshConfig(1, 1), None, [None])
    found = mode._with_nearest(REPORT, *given)
    assert found.tried == len(compiled) <= 4
    if pieces == 99:
        assert found.nearest == ()
    else:
        (nearest_one,) = found.nearest
        assert nearest_one.get("NUM_MICROBATCHES", 1) == pieces
        assert found.nearest_report.fits and not found.fits
        assert "with them: 20.000 GiB per chip, compiler's estimate 2 s" in found.text()


REPORT = Report(
    job="train",
    topology="v5e:4x4",
    slices=1,
    chips=16,
    hosts=4,
    mesh={"slice": 1, "data": 1, "fsdp": 16, "passages": 1, "model": 1},
    batch_size=128,
    fits=False,
    bytes_per_chip={"parameters": 2**30, "total": 20 * 2**30},
    hbm_bytes_per_chip=16 * 2**30,
    flops_per_step=3 * 10**15,
    model_flops_per_step=2 * 10**15,
    collectives={"all-gather": Traffic(48, 2**31)},
    bytes_between_slices=0,
    compute_seconds=0.95,
    memory_seconds=0.02,
    network_seconds=0.01,
    estimated_step_seconds=2.0,
    model_flop_utilisation=0.32,
    estimated_parts={"live_encoder/live_b/attention": 1.5, "other": 0.5},
    why_not="Used 20G of 15.75G hbm",
    nearest=({"REMAT_POLICY": "full", "NUM_MICROBATCHES": 2},),
    tried=3,
)


def test_the_report_is_json_and_words():
    found = json.loads(REPORT.as_json())
    assert found["fits"] is False and found["collectives"]["all-gather"]["bytes"] == 2**31
    text = REPORT.text()
    assert text.startswith("train on v5e:4x4: DOES NOT FIT.")
    assert "--gin.REMAT_POLICY='full' --gin.NUM_MICROBATCHES=2" in text
    assert "32% of peak" in text and "20 ms at peak HBM" in text and "kernels" not in text
    assert "live_encoder/live_b/attention        1.5 s" in text and "500 ms" in text
    assert "without 24 custom kernels" in dataclasses.replace(REPORT, kernels=24).text()
    assert "32%" in text and "mesh fsdp 16, batch 128" in text
    assert "no mesh was given" not in text
    # Nothing is known of a rejected program's traffic, which is not "0 ms".
    rejected = dataclasses.replace(
        REPORT, memory_seconds=None, network_seconds=None, collectives={}
    )
    assert "peak FLOPs" in rejected.text() and "bandwidth" not in rejected.text()
    none = dataclasses.replace(REPORT, nearest=())
    assert "none of 3 other settings fits" in none.text()
    flags = dataclasses.replace(REPORT, mesh_flags={"MESH_DATA": 1, "MESH_FSDP": 16})
    words = "--gin.MESH_DATA=1 --gin.MESH_FSDP=16\n"
    assert f"no mesh was given; it was compiled with: {words}" in flags.text()
    fits = dataclasses.replace(flags, fits=True, slices=2)
    assert f"no mesh was given; run it with: {words}" in fits.text()
    assert "between slices" in fits.text() and "not included" in fits.text()
