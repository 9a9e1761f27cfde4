"""A tiny GLIMMER in the trainer: mesh, scanned layers, microbatches, frozen memory, a short run."""

import dataclasses
import functools
import json

import jax
import numpy as np

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.objective import LossConfig
from glimmer_jax.models.stacking import stack_layers, unstack_layers
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.training.loop import TrainConfig
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import state_from_params, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step
from tests.models import tiny
from tests.training.toy_model import train

# Unrounded memory: rounding would amplify the noise of a different order of summation.
GLIMMER = dict(memory_layers=2, rerank_layers=1, num_kept=2, memory_codec="f32")
B, K, P, Q, T = 8, 3, 5, 4, 3
CONFIG = OptimizerConfig(learning_rate=0.01, min_dim_size_to_factor=1)


def make_model(distillation_weight=1.0, t5=tiny.T5, **config):
    loss = LossConfig(supervised_weight=0.5, distillation_weight=distillation_weight)
    return GlimmerModel(GlimmerConfig(t5, **GLIMMER, **config), loss)


def fresh_params(model):
    shapes = dict(question_tokens=(1, Q), passage_tokens=(1, K, P), decoder_input_tokens=(1, T))
    return lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"]


def batch_at(step):
    rng = np.random.default_rng(step)
    passages = rng.integers(2, 32, (B, K, P)).astype(np.int32)
    passages[:3, -1] = 0
    targets = rng.integers(2, 32, (B, T)).astype(np.int32)
    return {
        "question_tokens": rng.integers(2, 32, (B, Q)).astype(np.int32),
        "passage_tokens": passages,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(np.float32),
        "gold_passages": (rng.random((B, K)) < 0.4).astype(np.int32),
        "passage_ids": np.zeros((B, K), np.int64),
    }


def uneven(params):
    """Makes the second of two layers three times as large as the first.

    Its updates are then clipped and scaled differently. An optimiser that treated a scanned stack as one
    parameter would not do this.
    """

    def scale(path, leaf):
        keys = [key.key for key in path]
        if "kernel" in keys and "layers" in keys and leaf.shape[0] == 2:
            return leaf * np.array([1.0, 3.0], np.float32).reshape(2, *(1,) * (leaf.ndim - 1))
        return leaf

    return jax.tree_util.tree_map_with_path(scale, params)


@functools.cache
def start():
    """Scanned parameters of GLIMMER on the host."""
    return uneven(jax.device_get(jax.jit(fresh_params(make_model()))()))


def three_steps(params, mesh, num_microbatches=1, t5=tiny.T5):
    """The parameters and the metrics of each step."""
    model = make_model(t5=t5)
    shapes, names = model.abstract_variables()
    optimizer = make_optimizer(CONFIG, names)
    state = state_from_params(params, optimizer, mesh)
    step = jit_train_step(
        make_train_step(model, optimizer, num_microbatches),
        state_shardings(optimizer, shapes, mesh),
        mesh,
    )
    metrics = []
    with jax.set_mesh(mesh):
        for number in range(3):
            batch = put_batch(batch_at(number), mesh, num_microbatches)
            state, step_metrics = step(state, batch)
            metrics.append(jax.device_get(step_metrics))
    return jax.device_get(state.params), metrics


@functools.cache
def on_one_device():
    return three_steps(start(), make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def check(params, metrics):
    want, want_metrics = on_one_device()
    assert set(metrics[0]["sums"]) >= {"cross_entropy", "distillation", "supervised_rerank"}
    # The noise of a different order of summation grows over three steps. A step changes norms by 1e-2
    # and kernels by a few 1e-3; clipping a stack as one parameter would change this considerably.
    tiny.assert_trees_close(metrics, want_metrics, rtol=1e-3, atol=1e-5)
    tiny.assert_trees_close(params, want, rtol=0, atol=3e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, want, start())
    assert all(jax.tree.leaves(moved))


def test_three_steps_on_a_mesh_in_microbatches_equal_one_device():
    check(*three_steps(start(), make_mesh(MeshConfig(data=2, fsdp=2, model=2)), 2))


def test_three_steps_with_unrolled_layers_equal_scanned_ones():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    looped = dataclasses.replace(tiny.T5, scan_layers=False)
    params, metrics = three_steps(unstack_layers(start()), mesh, t5=looped)
    check(stack_layers(params), metrics)


def test_a_short_run_learns_and_does_not_change_frozen_memory(tmp_path):
    model = make_model(0.0, freeze_memory=True, share_question_encoder=False)
    shapes, names = model.abstract_variables()
    params = jax.jit(fresh_params(model))()
    fixed = batch_at(0)
    state = train(
        TrainConfig(total_steps=8, log_every=2),
        model,
        make_optimizer(OptimizerConfig(learning_rate=0.1), names, model.frozen(shapes)),
        make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        tmp_path,
        lambda step: iter([fixed] * (8 - step)),
        fresh_params(model),
    )
    lines = (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    for name in ("memory_encoder", "memory_embedder"):
        jax.tree.map(np.testing.assert_array_equal, params[name], state.params[name])
    assert not np.array_equal(
        params["token_embedder"]["embedding"], state.params["token_embedder"]["embedding"]
    )
