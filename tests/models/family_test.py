"""The cuts are one model: FiD is T5, the stacks add up, GLIMMER that keeps everything is LUMEN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.models.glimmer import (
    Glimmer,
    GlimmerConfig,
    Live,
    fuse,
    memory_layers,
    rerank_layers,
    select,
)
from glimmer_jax.models.recut import recut
from glimmer_jax.models.t5 import EncoderStack, position_bias
from glimmer_jax.nn.layers import RMSNorm
from tests.models import tiny

# Without jit, layer by layer: every cut runs the same few compiled operations.
LOOPED = dataclasses.replace(tiny.T5, scan_layers=False)
UNCUT = GlimmerConfig(LOOPED, memory_codec="f32")
KEEPS_ALL = dataclasses.replace(tiny.GLIMMER, num_kept=None)


def uncut_encoder(params, tokens):
    """A plain T5 encoder over unpadded tokens `[n, X]`, put together from its parts."""
    live = params["live_encoder"]
    length = tokens.shape[1]
    x = jnp.asarray(params["token_embedder"]["embedding"])[tokens]
    bias = position_bias(LOOPED, bidirectional=True).apply(
        {"params": live["relpos_bias"]}, length, length
    )
    stack = EncoderStack(LOOPED, LOOPED.num_encoder_layers)
    x = stack.apply({"params": live["live_b"]}, x, jnp.ones(tokens.shape, bool), bias)
    return RMSNorm(jnp.float32).apply({"params": live["encoder_norm"]}, x)


@pytest.fixture(scope="module")
def uncut_params():
    return tiny.params(UNCUT)


def test_fid_equals_the_uncut_encoder_on_the_unpadded_text(uncut_params):
    batch = tiny.batch(rows=2)
    # Two lengths are two compilations; what is tested is padding on both sides of the text.
    batch["question_tokens"][:] = [[0, 0, 5, 6], [0, 7, 8, 9]]
    batch["passage_tokens"][0, :, 4:] = 0
    batch["passage_tokens"][0, :, :4] = np.arange(2, 14).reshape(3, 4)
    batch["passage_tokens"][1] = np.arange(2, 20).reshape(3, 6)

    def read(module, batch):
        live = module.rerank(batch)
        return fuse(module.read(live.states, live.mask), live.mask)

    encoded, mask = Glimmer(UNCUT).apply({"params": uncut_params}, batch, method=read)
    for row in range(2):
        question = batch["question_tokens"][row]
        question = question[question > 0]
        passages = [p[p > 0] for p in batch["passage_tokens"][row]]
        want = uncut_encoder(uncut_params, np.stack([[*question, *p] for p in passages]))
        got = encoded[row][mask[row]].reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


CUTS = [(m, r) for m in range(5) for r in range(5 - m)]


@pytest.mark.parametrize("m, r", CUTS)
def test_memory_and_live_encoder_on_one_sequence_equal_the_full_encoder(uncut_params, m, r):
    config = dataclasses.replace(UNCUT, memory_layers=m, rerank_layers=r)
    tokens = np.random.default_rng(0).integers(2, tiny.V, (2, 9))

    def through(module, tokens):
        mask = tokens > 0
        states = module.encode_memory(tokens)["states"]
        return module.live_encoder.last(module.live_encoder.first(states, mask), mask)

    params = recut(uncut_params, UNCUT, config)
    got = Glimmer(config).apply({"params": params}, tokens, method=through)
    np.testing.assert_allclose(got, uncut_encoder(uncut_params, tokens), rtol=0, atol=1e-5)


def test_the_cut_is_really_there(uncut_params):
    """Question and passage meet only in the live layers: with M = L they never do."""
    batch = tiny.batch(rows=2)
    other = dict(batch, question_tokens=np.roll(batch["question_tokens"], 1, axis=0))
    for m, meets in ((2, True), (4, False)):
        config = dataclasses.replace(UNCUT, memory_layers=m)
        params = recut(uncut_params, UNCUT, config)

        def passage_states(module, batch):
            live = module.rerank(batch)
            return module.read(live.states, live.mask)[:, :, tiny.Q :][live.mask[..., tiny.Q :]]

        one, two = (
            Glimmer(config).apply({"params": params}, b, method=passage_states)
            for b in (batch, other)
        )
        assert (np.abs(one - two).max() > 1e-3) == meets


def test_glimmer_that_keeps_all_equals_lumen_also_after_training():
    params, batch = tiny.params(KEEPS_ALL), tiny.batch()
    start = params
    for step in range(3):
        want = tiny.forward(tiny.LUMEN)(recut(params, KEEPS_ALL, tiny.LUMEN), batch)[0]
        got = tiny.forward(KEEPS_ALL)(params, batch)[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        _, grads = tiny.loss_and_grad(KEEPS_ALL, tiny.LIGHT_LOSS)(params, tiny.batch(seed=step))
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, params)
    assert min(jax.tree.leaves(moved["live_encoder"]["live_a"])) > 0
    # The two position tables have been trained apart by now.
    tables = params["memory_encoder"]["relpos_bias"], params["live_encoder"]["relpos_bias"]
    assert np.abs(tables[0]["rel_embedding"] - tables[1]["rel_embedding"]).max() > 0


def test_passage_order_changes_nothing_in_the_decoders_output():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    order = np.array([2, 0, 1])
    logits, live, kept = tiny.forward(tiny.GLIMMER)(params, batch)
    permuted = dict(batch, passage_tokens=batch["passage_tokens"][:, order])
    logits_2, live_2, kept_2 = tiny.forward(tiny.GLIMMER)(params, permuted)
    np.testing.assert_allclose(logits_2, logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(live_2.scores, live.scores[:, order], rtol=0, atol=1e-5)
    # The same passages are kept where none ties with another (two absent ones do).
    for row in range(tiny.B):
        if np.isfinite(live.scores[row]).sum() >= 2:
            assert set(order[kept_2[row]]) == set(np.asarray(kept[row]))
    # Both choices happen: this batch keeps more than the first two.
    assert len({tuple(row) for row in np.asarray(kept)}) > 1


def test_kept_passages_are_the_best_by_score():
    scores = np.array([[0.5, -np.inf, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-np.inf] * 4], np.float32)
    states = np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype(np.float32)
    live = Live(states, np.isfinite(scores)[..., None] & np.ones((3, 4, 2), bool), scores)
    got, mask, kept = select(live, 2)
    # In the retriever's order; ties go to the earlier passage.
    np.testing.assert_array_equal(kept, [[2, 3], [0, 1], [0, 1]])
    np.testing.assert_array_equal(got, states[np.arange(3)[:, None], kept])
    np.testing.assert_array_equal(mask[2], False)
    assert select(live, None)[2].shape == (3, 4)


def test_no_gradient_goes_through_the_choice():
    live = tiny.as_jax(
        Live(np.ones((1, 3, 2, 4), np.float32), np.ones((1, 3, 2), bool), np.ones((1, 3)))
    )
    grad = jax.grad(lambda s: jnp.sum(select(live._replace(scores=s), 2)[0]))(live.scores)
    assert not np.asarray(grad).any()


def test_keeping_more_passages_than_there_are_is_rejected():
    live = Live(np.zeros((1, 3, 2, 4)), np.ones((1, 3, 2), bool), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="num_kept=5 .* 3 .*TASK_FEATURE_LENGTHS"):
        select(live, 5)


@pytest.mark.parametrize(
    "layers, cut", [(8, (5, 1, 2)), (12, (8, 1, 3)), (24, (16, 2, 6))], ids=str
)
def test_the_main_setting_cuts_each_size_as_the_paper_does(layers, cut):
    m, r = memory_layers(layers, 1 / 3), rerank_layers(layers, 1 / 3, 1 / 4)
    assert (m, r, layers - m - r) == cut


def test_extreme_proportions_use_all_layers_in_one_stack():
    assert memory_layers(12, 1.0) == 0 and memory_layers(12, 0.0) == 12
    assert rerank_layers(12, 1 / 3, 0.0) == 0 and rerank_layers(12, 1 / 3, 1.0) == 4
    assert rerank_layers(12, 0.0, 0.5) == 0


@pytest.mark.parametrize(
    "function, args, match",
    [
        (memory_layers, (12, 1.5), r"alpha.*\[0, 1\], got 1\.5"),
        (rerank_layers, (12, 0.5, -1), r"beta.*\[0, 1\], got -1"),
    ],
)
def test_proportions_outside_their_range_are_rejected(function, args, match):
    with pytest.raises(ValueError, match=match):
        function(*args)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(memory_layers=3, rerank_layers=2), r"memory_layers=3 and rerank_layers=2 must fit"),
        (dict(memory_layers=-1), r"must fit into the encoder's 4"),
        (dict(memory_layers=2, rerank_layers=1, num_kept=0), r"num_kept must be at least 1"),
        (dict(memory_layers=2, num_kept=2), r"num_kept=2 needs scores.*Set rerank_layers"),
        (dict(memory_layers=2, separate_reranker=True), r"separate_reranker needs rerank_layers"),
        (dict(freeze_memory=True), "memory_layers=0 .*freeze_memory=False"),
        (dict(share_question_encoder=False), "memory_layers=0 .*share_question_encoder=True"),
        (dict(memory_layers=2, memory_codec="zip"), r"memory_codec.*bf16.*zip"),
    ],
)
def test_contradictory_settings_are_rejected(kwargs, match):
    with pytest.raises(ValueError, match=match):
        GlimmerConfig(tiny.T5, **kwargs)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(emb_dim=0), r"emb_dim must be at least 1, got 0"),
        (dict(dtype="float16"), r"dtype must be 'float32' or 'bfloat16', got 'float16'"),
        (dict(matmul_dtype="int8"), r"matmul_dtype must be None or 'bfloat16', got 'int8'"),
        (dict(remat_policy="some"), "remat_policy.*none, minimal, full.*some"),
        (dict(attention="flash"), "attention.*plain, cudnn, tpu.*flash"),
        (dict(attention="cudnn"), "dtype='float32' and head_dim=4.*Set ACTIVATION_DTYPE"),
        (dict(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1\.0"),
        (dict(mlp_activations=("swish",)), "mlp_activations.*relu.*swish"),
        (dict(mlp_activations=()), "mlp_activations.*relu"),
    ],
)
def test_sizes_and_numerics_outside_their_range_are_rejected(kwargs, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(tiny.T5, **kwargs)


def test_a_shared_position_table_leaves_the_function_and_has_no_copy():
    shared = dataclasses.replace(KEEPS_ALL, share_position_table=True)
    params = recut(tiny.params(tiny.FID), tiny.FID, shared)
    assert "relpos_bias" not in params["memory_encoder"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tiny.abstract(shared)[0])
    apart = recut(params, shared, KEEPS_ALL)
    want = tiny.forward(KEEPS_ALL)(apart, tiny.batch())[0]
    np.testing.assert_allclose(
        tiny.forward(shared)(params, tiny.batch())[0], want, rtol=0, atol=1e-5
    )
    tiny.assert_trees_equal(recut(apart, KEEPS_ALL, shared), params)
