"""The tiny T5 of all tests, its cuts, parameters from numpy, batches, and functions compiled once.

Tests that need other sizes derive them with `dataclasses.replace(tiny.T5, ...)`.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax.models.glimmer import Glimmer, GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.objective import LossConfig
from glimmer_jax.models.selection import fuse, select
from glimmer_jax.models.t5 import T5Config

B, K, P, Q, T, V = 8, 3, 6, 4, 5, 32

T5 = T5Config(
    vocab_size=V,
    emb_dim=16,
    num_heads=4,
    head_dim=4,
    mlp_dim=32,
    num_encoder_layers=4,
    num_decoder_layers=2,
)
FID = GlimmerConfig(T5, memory_codec="f32")
LUMEN = GlimmerConfig(T5, memory_layers=2, memory_codec="f32")
GLIMMER = GlimmerConfig(T5, memory_layers=2, rerank_layers=1, num_kept=2, memory_codec="f32")
# T5 1.0: an ungated feed-forward, and the embedding as output layer.
V1_0 = dataclasses.replace(
    FID, t5=dataclasses.replace(T5, mlp_activations=("relu",), tie_output=True)
)
FROZEN = dataclasses.replace(GLIMMER, freeze_memory=True, share_question_encoder=False)
# Tests spend more time compiling than computing.
QUICK = {"xla_backend_optimization_level": 0}
# All terms of the loss.
FULL_LOSS = LossConfig(z_loss=1e-2, temperature=0.5, supervised_weight=0.7, teacher_chunk=2)
# Without the teacher, which is half of the compilation.
LIGHT_LOSS = dataclasses.replace(FULL_LOSS, distillation_weight=0.0)


@functools.cache
def model(config, loss=FULL_LOSS):
    return GlimmerModel(config, loss)


@functools.cache
def abstract(config):
    return model(config).abstract_variables()


def params(config, seed=0):
    """float32 numpy parameters; each leaf depends only on its path, and kernels keep variance."""

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        value = random.normal(size=shape.shape)
        if "scale" in name:
            value = 1.0 + 0.1 * value
        elif name.endswith("['kernel']") and len(shape.shape) > 1:
            value = value / np.sqrt(shape.shape[-2])
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract(config)[0])


def batch(seed=0, rows=B, passages=K, gold=True):
    """A batch with ragged questions, passages and targets, and absent passages."""
    random = np.random.default_rng(seed)

    def tokens(*shape):
        return random.integers(2, V, shape).astype(np.int32)

    question, passage, target = tokens(rows, Q), tokens(rows, passages, P), tokens(rows, T)
    question[np.arange(Q)[None] < random.integers(0, Q - 1, rows)[:, None]] = 0
    passage[np.arange(P) >= random.integers(2, P + 1, (rows, passages))[..., None]] = 0
    target[np.arange(T)[None] >= random.integers(2, T + 1, rows)[:, None]] = 0
    # Row 1 lacks a passage in the middle, row 2 has only one.
    if rows > 2 and passages > 2:
        passage[1, 1], passage[2, 1:] = 0, 0
    out = {
        "question_tokens": question,
        "passage_tokens": passage,
        "decoder_input_tokens": np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": (target > 0).astype(np.float32),
    }
    if gold:
        out["gold_passages"] = (random.random((rows, passages)) < 0.5).astype(np.int32)
        out["gold_passages"][0] = 0
    return out


@functools.cache
def forward(config):
    """Jitted `(params, batch) -> logits, live, kept`."""
    return jax.jit(lambda p, b: Glimmer(config).apply({"params": p}, b), compiler_options=QUICK)


@functools.cache
def cached_logits(config):
    """Jitted `(params, batch, inputs [B, beams, T]) -> [B, beams, T, V]`, one cached step per token."""

    def start(module, batch, inputs):
        live = module.rerank(batch)
        states, mask, _ = select(live, config.num_kept)
        encoded, mask = fuse(module.read(states, mask), mask)
        return module.start_decoding(encoded), module.empty_cache(*inputs.shape), mask

    def run(params, batch, inputs):
        variables = {"params": params}
        cross, cache, mask = Glimmer(config).apply(variables, batch, inputs, method=start)

        def step(cache, tokens_index):
            tokens, index = tokens_index
            logits, cache = Glimmer(config).apply(
                variables, tokens, index, cache, cross, mask, method="decode_step"
            )
            return cache, logits

        by_time = (jnp.moveaxis(inputs, 2, 0), jnp.arange(inputs.shape[2]))
        return jnp.moveaxis(jax.lax.scan(step, cache, by_time)[1], 0, 2)

    return jax.jit(run)


def assert_cached_decoding_equals(full, config, params, rows=3, beams=2):
    """Feeds each beam of the cached decoder another target, and compares with the forward pass.

    Args:
      full: `(batch) -> logits [B, T, V]`.
    """
    inputs = np.random.default_rng(1).integers(2, V, (rows, beams, T)).astype(np.int32)
    inputs[..., 0] = 0
    cached = cached_logits(config)(params, batch(rows=rows), inputs)
    for beam in range(beams):
        want = full(dict(batch(rows=rows), decoder_input_tokens=inputs[:, beam]))
        np.testing.assert_allclose(cached[:, beam], want, rtol=0, atol=1e-5)


@functools.cache
def loss_and_grad(config, loss=FULL_LOSS):
    """Jitted `(params, batch) -> ((loss, metrics), gradient)`, without dropout, from tokens."""
    loss_fn = model(config, loss).loss_fn
    return jax.jit(
        jax.value_and_grad(lambda p, b: loss_fn(p, b, None), has_aux=True), compiler_options=QUICK
    )


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    """Equal structure, and every pair of leaves close; names the leaf that is not."""
    jax.tree_util.tree_map_with_path(
        lambda path, x, y: np.testing.assert_allclose(
            np.asarray(x), np.asarray(y), rtol, atol, err_msg=jax.tree_util.keystr(path)
        ),
        a,
        b,
    )


def assert_trees_equal(a, b):
    """Equal structure and equal bits."""
    assert_trees_close(a, b, rtol=0, atol=0)


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)
