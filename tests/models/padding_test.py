"""Padding tokens, passages and rows, and any change of length bucket, change nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from glimmer_jax.models.glimmer import Glimmer
from glimmer_jax.models.selection import fuse
from glimmer_jax.models.stacking import unstack_layers
from tests.models import tiny

AXIS_PADS = {
    "question": {"question_tokens": ((0, 0), (3, 0))},
    "passage": {"passage_tokens": ((0, 0), (0, 0), (0, 4))},
    "passages": {"passage_tokens": ((0, 0), (0, 2), (0, 0)), "gold_passages": ((0, 0), (0, 2))},
    "target": {
        "decoder_input_tokens": ((0, 0), (0, 3)),
        "decoder_target_tokens": ((0, 0), (0, 3)),
        "decoder_loss_weights": ((0, 0), (0, 3)),
    },
}


def pad(batch, *names, rows=0):
    """The batch with more slots along the named axes, and `rows` empty rows at its end."""
    out = dict(batch)
    for name in names:
        for key, widths in AXIS_PADS[name].items():
            out[key] = np.pad(out[key], widths)
    return {k: np.pad(v, ((0, rows), *((0, 0),) * (v.ndim - 1))) for k, v in out.items()}


def with_empty_question():
    """A batch in which row 3 has no passage at all."""
    batch = tiny.batch()
    batch["passage_tokens"][3] = 0
    return batch


@pytest.fixture(scope="module")
def params():
    return tiny.params(tiny.GLIMMER)


@pytest.mark.parametrize(
    "names, rows", [((name,), 0) for name in AXIS_PADS] + [((), 3)], ids=[*AXIS_PADS, "rows"]
)
def test_padding_changes_neither_logits_nor_scores_nor_the_choice(params, names, rows):
    batch = with_empty_question()
    real = batch["decoder_loss_weights"] > 0
    logits, live, kept = tiny.forward(tiny.GLIMMER)(params, batch)
    padded = tiny.forward(tiny.GLIMMER)(params, pad(batch, *names, rows=rows))
    assert np.isfinite(padded[0]).all()
    np.testing.assert_allclose(padded[0][: tiny.B, : tiny.T][real], logits[real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(padded[1].scores[: tiny.B, : tiny.K], live.scores, rtol=0, atol=1e-5)
    assert (padded[1].scores[: tiny.B, tiny.K :] == -np.inf).all()
    np.testing.assert_array_equal(padded[2][: tiny.B], kept)


def test_padding_changes_neither_loss_nor_metrics_nor_gradient(params):
    batch = with_empty_question()
    (loss, metrics), grad = tiny.loss_and_grad(tiny.GLIMMER)(params, batch)
    padded = pad(batch, *AXIS_PADS, rows=2)
    (loss_2, metrics_2), grad_2 = tiny.loss_and_grad(tiny.GLIMMER)(params, padded)
    assert set(metrics) >= {"distillation", "supervised_rerank", "cross_entropy", "z_loss"}
    np.testing.assert_allclose(loss_2, loss, rtol=1e-5)
    tiny.assert_trees_close(metrics_2, metrics, rtol=1e-5)
    tiny.assert_trees_close(grad_2, grad, rtol=1e-4, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad_2))
    # Every parameter is reached, so that the comparison means something.
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grad))


def test_what_padded_passages_hold_in_memory_is_not_seen(params):
    """Slots of a store's arrays beyond a passage's length may hold anything finite."""
    batch = tiny.batch()
    tokens = batch.pop("passage_tokens")
    states = np.random.default_rng(0).normal(size=(*tokens.shape, tiny.T5.emb_dim))
    states = states.astype(np.float32)
    batch["passage_lengths"] = (tokens > 0).sum(-1).astype(np.int32)
    clean = dict(batch, passage_memory={"states": np.where(tokens[..., None] > 0, states, 0)})
    dirty = dict(batch, passage_memory={"states": np.where(tokens[..., None] > 0, states, 1e3)})
    one, two = (tiny.forward(tiny.GLIMMER)(params, b) for b in (clean, dirty))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1].scores, two[1].scores)


def test_a_question_without_passages_reads_one_empty_passage(params):
    """Its answer is that of the stacks over the question alone."""
    batch = with_empty_question()
    logits, live, _ = tiny.forward(tiny.GLIMMER)(params, batch)
    assert np.isfinite(live.scores[3, 0]) and (live.scores[3, 1:] == -np.inf).all()

    config = dataclasses.replace(tiny.GLIMMER, t5=dataclasses.replace(tiny.T5, scan_layers=False))

    def question_alone(module, question, decoder_input):
        mask = question > 0
        states = module.live_encoder.first(module.encode_question(question), mask)
        states = module.live_encoder.last(states, mask)
        return module.decode(states, mask, decoder_input)

    question = batch["question_tokens"][3]
    want = Glimmer(config).apply(
        {"params": unstack_layers(params)},
        question[question > 0][None],
        batch["decoder_input_tokens"][3:4],
        method=question_alone,
    )
    np.testing.assert_allclose(logits[3], want[0], rtol=0, atol=1e-5)


def test_fusing_puts_kept_passages_side_by_side():
    states = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    mask = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    fused, fused_mask = fuse(states, mask)
    np.testing.assert_array_equal(fused[1, 4:8], states[1, 1])
    np.testing.assert_array_equal(fused_mask[1, 4:8], mask[1, 1])
