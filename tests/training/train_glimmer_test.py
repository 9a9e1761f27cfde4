"""The real model through the trainer, tiny: mesh, microbatches, frozen memory, a short run."""

import json

import jax
import numpy as np

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel, LossConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.training.loop import TrainConfig, train
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.prefetch import put_batch
from glimmer_jax.training.state import init_state, state_from_params, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step

T5 = T5Config(
    vocab_size=32,
    emb_dim=16,
    num_heads=4,
    head_dim=4,
    mlp_dim=32,
    num_encoder_layers=3,
    num_decoder_layers=1,
)
GLIMMER = dict(memory_layers=1, rerank_layers=1, num_kept=2)
B, K, P, Q, T = 8, 3, 5, 4, 3
CONFIG = OptimizerConfig(learning_rate=0.01, min_dim_size_to_factor=1)


def make_model(distillation_weight=1.0, **config):
    loss = LossConfig(supervised_weight=0.5, distillation_weight=distillation_weight)
    return GlimmerModel(GlimmerConfig(T5, **GLIMMER, **config), loss)


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


def one_step(model, mesh, state, num_microbatches):
    shapes, names = model.abstract_variables()
    optimizer = make_optimizer(CONFIG, names)
    step = jit_train_step(
        make_train_step(model, optimizer, num_microbatches),
        state_shardings(optimizer, shapes, mesh),
        mesh,
    )
    with jax.set_mesh(mesh):
        state, metrics = step(state, put_batch(batch_at(0), mesh, num_microbatches))
    return jax.device_get(metrics)


def test_mesh_and_microbatches_change_nothing():
    model = make_model()
    optimizer = make_optimizer(CONFIG, model.abstract_variables()[1])
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, model=2), jax.devices()[:4])
    state = init_state(fresh_params(model), optimizer, mesh)
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    on_one = state_from_params(jax.device_get(state.params), optimizer, one)
    whole = one_step(model, one, on_one, 1)
    divided = one_step(model, mesh, state, 4)
    assert set(whole["sums"]) >= {"cross_entropy", "distillation", "supervised_rerank"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), divided, whole)


def test_a_short_run_learns_and_leaves_frozen_memory_alone(tmp_path):
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
