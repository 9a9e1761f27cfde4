"""What a training step sends between devices: what FSDP and tensor parallelism mean to, at any depth."""

import collections
import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import check_lengths
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.objective import LossConfig
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import chips, hlo, programs
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig
from tests.models import tiny

FSDP, MODEL = 4, 2
LENGTHS = {"inputs": 6, "targets": 5, "passages": (3, 7)}
BATCH, K, N, T = 8, 3, 6 + 7, 5  # N: a question and a passage, read together
DEPTHS = (2, 3)  # a single layer would be no loop
LOSS = LossConfig(distillation_weight=0.0)


def model_of(depth, live_layers=0):
    """FiD; or GLIMMER with as many layers in each of its parts."""
    layers = depth * 3 if live_layers else depth
    t5 = dataclasses.replace(tiny.T5, num_encoder_layers=layers, num_decoder_layers=depth)
    cut = dict(memory_layers=depth, rerank_layers=depth, num_kept=2) if live_layers else {}
    return GlimmerModel(GlimmerConfig(t5, **cut), LOSS)


@functools.cache
def compiled(depth, live_layers=0):
    """Collectives `(axes, kind, bytes) -> how many` in loops and outside; bytes of the optimiser.

    In a loop each must run once a layer.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=FSDP, model=MODEL))
    settings = {
        "model": model_of(depth, live_layers),
        "loop_config": TrainConfig(total_steps=1),
        "optimizer": OptimizerConfig(min_dim_size_to_factor=1),
        "task_feature_lengths": LENGTHS,
        "batch_size": BATCH,
    }
    program = programs.train(settings, mesh)
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
    text = lowered.compile(compiler_options=tiny.QUICK).as_text()
    within, outside = collections.Counter(), collections.Counter()
    for one in hlo.collectives(text):
        assert one.times == (depth if one.in_loop else 1)
        (within if one.in_loop else outside)[along(one, mesh), one.kind, one.size] += 1
    state = jax.tree.leaves(program.kinds["optimiser"])
    return within, outside, sum(leaf.size * leaf.dtype.itemsize for leaf in state)


def along(collective, mesh):
    """The mesh axes whose devices it joins."""
    index = np.indices(mesh.devices.shape).reshape(len(mesh.axis_names), -1)
    return tuple(a for a, i in zip(mesh.axis_names, index, strict=True) if collective.joins(i))


def layer_bytes(model, ways=1, item=4):
    """Bytes of each parameter of a layer of each stack, where `model` has so many ways."""
    shapes, names = model.abstract_variables()
    found = {"encoder": [], "decoder": []}

    def add(path, names, leaf):
        if axes.LAYERS in names:
            assert axes.EMBED in names
            part = ways if {axes.JOINED_KV, axes.MLP} & set(names) else 1
            stack = "decoder" if "decoder" in jax.tree_util.keystr(path) else "encoder"
            found[stack].append(leaf.size // leaf.shape[0] * item // part)

    jax.tree_util.tree_map_with_path(
        add, names, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    return found


def chosen(found, axis, kind):
    return collections.Counter({s: n for (a, k, s), n in found.items() if (a, k) == (axis, kind)})


def test_parameters_are_gathered_per_use_and_gradients_summed_once():
    within, _, _ = compiled(DEPTHS[0])
    layers = layer_bytes(model_of(DEPTHS[0]), MODEL)
    gathered = chosen(within, ("fsdp",), "all-gather")
    # Forward and backward.
    assert gathered == collections.Counter(2 * (layers["encoder"] + layers["decoder"]))
    # Together with that of the position bias, [H, N, N] or [H, T, T] of one layer. A CPU program
    # has no reduce-scatter.
    heads = tiny.T5.num_heads // MODEL
    bias = {"encoder": heads * N * N * 4, "decoder": heads * T * T * 4}
    summed = chosen(within, ("fsdp",), "all-reduce")
    assert summed == collections.Counter(sum(layers[stack]) + bias[stack] for stack in layers)


def test_tensor_parallelism_reduces_after_attention_and_mlp():
    within, _, _ = compiled(DEPTHS[0])
    row = BATCH // FSDP * tiny.T5.emb_dim * 4
    states, targets = K * N * row, T * row
    # Forward at the end of each block; backward at its start, where a CPU program sums what comes
    # back from each projection by itself: three of attention, two of the feed-forward.
    encoder = [states] * 2 + [3 * states, 2 * states]
    # Cross-attention: of its queries, and of the states that keys and values are made of.
    decoder = [targets] * 3 + [3 * targets, targets + 2 * states, 2 * targets]
    summed = chosen(within, ("model",), "all-reduce")
    assert summed == collections.Counter(encoder + decoder)


def test_nothing_else_is_sent_in_a_layer():
    within, _, _ = compiled(DEPTHS[0])
    kinds = {(axis, kind) for axis, kind, _ in within}
    assert kinds == {
        (("fsdp",), "all-gather"),
        (("fsdp",), "all-reduce"),
        (("model",), "all-reduce"),
    }


@pytest.mark.parametrize(
    "live_layers", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["fid", "glimmer"]
)
def test_depth_changes_only_iterations_and_optimiser_statistics(live_layers):
    (within, outside, state), (deeper, outside_deeper, more_state) = (
        compiled(depth, live_layers) for depth in DEPTHS
    )
    assert deeper == within

    def size(found, all_reduce):
        return sum(
            size * n for (_, kind, size), n in found.items() if (kind == "all-reduce") is all_reduce
        )

    assert size(outside_deeper, all_reduce=False) == size(outside, all_reduce=False)
    # Adafactor's means over rows and columns are vectors, of each layer one.
    grown = size(outside_deeper, all_reduce=True) - size(outside, all_reduce=True)
    assert 0 < grown <= more_state - state


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpus_program_sends_nothing_else():
    """Its compiler sums before it sends, scatters sums, and takes the position bias out of the loop."""
    wide = dict(emb_dim=1024, num_heads=8, head_dim=128, mlp_dim=2048, dtype="bfloat16")
    t5 = dataclasses.replace(tiny.T5, num_encoder_layers=2, vocab_size=1024, **wide)
    model = GlimmerModel(GlimmerConfig(t5), LOSS)
    lengths = check_lengths({"inputs": 128, "targets": 32, "passages": (4, 128)})
    devices = chips.devices(chips.parse_topology("v5p:2x2x1"))
    names = model.abstract_variables()[1]
    found = {}
    for axis in ("fsdp", "model"):
        mesh = make_mesh(MeshConfig(**{"data": 1, axis: 4}), devices)
        gradient = jax.jit(
            jax.grad(lambda params, batch: model.loss_fn(params, batch, None)[0]),
            out_shardings=partitioning.shardings(names, mesh),
        )
        params = programs.parameter_shapes(model, mesh)
        batch = programs.batch_shapes(model, lengths, 8, mesh, from_memory=False)
        with jax.set_mesh(mesh):
            text = gradient.lower(params, batch).compile().as_text()
        every = [one for one in hlo.collectives(text) if one.in_loop]
        assert all(one.times == 2 for one in every)
        found[axis] = collections.Counter((one.kind, one.size) for one in every)

    layers = layer_bytes(model, item=jnp.dtype("bfloat16").itemsize)
    norm = t5.emb_dim * 2
    kernels = [size for stack in layers.values() for size in stack if size != norm]
    norms = {stack: [size for size in layers[stack] if size == norm] for stack in layers}
    fsdp = [("all-gather", size) for stack in layers.values() for size in 2 * stack]
    fsdp += [("reduce-scatter", size) for size in kernels]
    fsdp += [("all-reduce", sum(sizes)) for sizes in norms.values()]
    assert found["fsdp"] == collections.Counter(fsdp)

    states, targets = (n * t5.emb_dim * 2 for n in (8 * 4 * 256, 8 * 32))
    sums = [states] * 4 + [targets] * 5 + [targets + 2 * states]
    assert found["model"] == collections.Counter(("all-reduce", size) for size in sums)
