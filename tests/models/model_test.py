"""The T5X-style class: its loss, its denominators, its methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import losses
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.objective import LossConfig
from tests.models import tiny

# The distillation alone.
TEACHING = LossConfig(z_loss=0.0, cross_entropy_weight=0.0, temperature=0.5, teacher_chunk=2)


def numpy_log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_loss_is_the_sum_of_its_terms_over_their_denominators():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    (loss, metrics), _ = tiny.loss_and_grad(tiny.GLIMMER)(params, batch)
    logits, live, kept = tiny.forward(tiny.GLIMMER)(params, batch)

    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    log_probs = numpy_log_softmax(logits)
    chosen = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    log_z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    exists = (batch["passage_tokens"] > 0).any(-1)
    gold = (batch["gold_passages"] > 0) & exists
    # What each passage alone would answer: a forward pass in which it is the only one kept.
    scores = np.asarray(live.scores, np.float64)
    useful = np.stack([alone(params, batch, k) for k in range(tiny.K)], axis=1)
    distillation = supervised = 0.0
    for row, keep in enumerate(exists):
        rank = numpy_log_softmax(scores[row][keep] / 0.5)
        if keep.sum() >= 2:
            lm = numpy_log_softmax(useful[row][keep] / 0.5)
            distillation += (np.exp(lm) * (lm - rank)).sum()
        if gold[row].any():
            supervised -= np.log(np.exp(rank[gold[row][keep]]).sum())

    several, with_gold = (exists.sum(-1) >= 2).sum(), gold.any(-1).sum()
    assert 0 < several < tiny.B and 0 < with_gold < tiny.B
    want = {
        "cross_entropy": (-(chosen * weights).sum(), weights.sum()),
        "first_token": (-(chosen * weights)[:, 0].sum(), weights[:, 0].sum()),
        "z_loss": (1e-2 * (log_z**2 * weights).sum(), weights.sum()),
        "token_accuracy": (((log_probs.argmax(-1) == targets) * weights).sum(), weights.sum()),
        "distillation": (distillation, several),
        "supervised_rerank": (supervised, with_gold),
        "recall_at_1": (gold[np.arange(tiny.B), scores.argmax(-1)].sum(), tiny.B),
        "recall_kept": (np.take_along_axis(gold, np.asarray(kept), 1).any(-1).sum(), tiny.B),
    }
    assert metrics.keys() == want.keys()
    for name, pair in want.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-4, err_msg=name)
    parts = {name: total / weight for name, (total, weight) in want.items()}
    total = parts["cross_entropy"] + parts["z_loss"] + parts["distillation"]
    np.testing.assert_allclose(loss, total + 0.7 * parts["supervised_rerank"], rtol=1e-5)


def alone(params, batch, k):
    """log p(answer | passage k alone), float64 `[B]`: all other passages are taken away."""
    only = np.zeros_like(batch["passage_tokens"])
    only[:, k] = batch["passage_tokens"][:, k]
    logits, *_ = tiny.forward(tiny.GLIMMER)(params, dict(batch, passage_tokens=only))
    targets = batch["decoder_target_tokens"]
    chosen = np.take_along_axis(numpy_log_softmax(logits), targets[..., None], -1)[..., 0]
    return (chosen * batch["decoder_loss_weights"]).sum(-1)


def test_gradients_of_microbatches_sum_to_the_gradient_of_the_batch():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    model = tiny.model(tiny.GLIMMER)
    (loss, metrics), grad = tiny.loss_and_grad(tiny.GLIMMER)(params, batch)
    normalizers = model.loss_normalizers(batch)
    step = jax.jit(
        jax.value_and_grad(lambda p, b: model.loss_fn(p, b, None, normalizers), has_aux=True),
        compiler_options=tiny.QUICK,
    )
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 4), slice(4, 8))]
    tokens = [half["decoder_loss_weights"].sum() for half in halves]
    assert tokens[0] != tokens[1]  # or a plain mean of means would do
    parts = [step(params, half) for half in halves]
    total = jax.tree.map(lambda a, b: a + b, *parts)
    np.testing.assert_allclose(total[0][0], loss, rtol=1e-5)
    tiny.assert_trees_close(total[0][1], metrics, rtol=1e-5)
    tiny.assert_trees_close(total[1], grad, rtol=1e-4, atol=1e-5)


def test_distillation_reaches_only_what_the_score_reads():
    """Never the teacher: neither the layers after the choice nor the decoder."""
    grad = tiny.loss_and_grad(tiny.GLIMMER, TEACHING)(tiny.params(tiny.GLIMMER), tiny.batch())[1]
    live = grad["live_encoder"]
    for tree in (grad["decoder"], live["live_b"], live["encoder_norm"]):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))
    for tree in (grad["reranker"], live["live_a"], grad["memory_encoder"]):
        assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


def test_denominators_are_counts_and_never_zero():
    batch = tiny.batch()
    got = tiny.model(tiny.GLIMMER).loss_normalizers(batch)
    exists = (batch["passage_tokens"] > 0).any(-1)
    assert got["tokens"] == batch["decoder_loss_weights"].sum()
    assert got["questions"] == (exists.sum(-1) >= 2).sum()
    assert got["gold_questions"] == ((batch["gold_passages"] > 0) & exists).any(-1).sum()
    empty = jax.tree.map(np.zeros_like, batch)
    assert all(v == 1 for v in tiny.model(tiny.GLIMMER).loss_normalizers(empty).values())


def test_score_batch_is_the_log_probability_of_the_target():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch()
    logits, live, kept = tiny.forward(tiny.GLIMMER)(params, batch)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    model = tiny.model(tiny.GLIMMER)
    score = jax.jit(
        lambda p, b: model.score_batch(p, b, return_intermediates=True),
        compiler_options=tiny.QUICK,
    )
    scores, aux = score(params, batch)
    want = losses.log_likelihood(logits, targets, weights)
    np.testing.assert_allclose(scores, want, rtol=1e-5)
    np.testing.assert_allclose(aux["passage_scores"], live.scores, rtol=1e-5)
    np.testing.assert_array_equal(aux["kept_passages"], kept)


def test_dropout_uses_only_the_given_rng_stream():
    config = dataclasses.replace(tiny.FID, t5=dataclasses.replace(tiny.T5, dropout_rate=0.3))
    model, batch = tiny.model(config, tiny.LIGHT_LOSS), tiny.batch()
    params = tiny.params(config)
    run = jax.jit(lambda key: model.loss_fn(params, batch, key)[0], compiler_options=tiny.QUICK)
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert first == again != other


def test_initial_variables_carry_t5x_axis_metadata():
    model = tiny.model(tiny.GLIMMER)
    shapes = {
        "question_tokens": (2, tiny.Q),
        "passage_tokens": (2, tiny.K, tiny.P),
        "decoder_input_tokens": (2, tiny.T),
    }
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    assert variables["params"] == tiny.abstract(tiny.GLIMMER)[0]
    names = variables["params_axes"]["decoder"]["layers"]["mlp"]["wo"]["kernel"].names
    assert names == ("layers", "mlp", "embed")


def test_bfloat16_activations_keep_float32_scores_logits_and_loss():
    t5 = dataclasses.replace(tiny.T5, dtype="bfloat16")
    model = tiny.model(dataclasses.replace(tiny.GLIMMER, t5=t5))
    params, batch = tiny.abstract(tiny.GLIMMER)[0], tiny.batch()
    logits, live, _ = jax.eval_shape(lambda p: model.module.apply({"params": p}, batch), params)
    loss, metrics = jax.eval_shape(lambda p: model.loss_fn(p, batch, None), params)
    assert live.states.dtype == jnp.bfloat16
    for array in (logits, live.scores, loss, *jax.tree.leaves(metrics)):
        assert array.dtype == jnp.float32


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(temperature=0.0), r"temperature must be positive, got 0\.0"),
        (dict(kl_direction="up"), r"kl_direction must be one of .*got 'up'"),
        (dict(teacher_chunk=0), r"teacher_chunk must be at least 1, got 0"),
        (dict(supervised_weight=-1.0), r"Loss weights must not be negative"),
    ],
)
def test_loss_settings_outside_their_range_are_rejected(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LossConfig(**kwargs)


def test_without_weight_on_cross_entropy_the_reader_learns_nothing():
    loss = dataclasses.replace(tiny.LIGHT_LOSS, cross_entropy_weight=0.0)
    _, grads = tiny.loss_and_grad(tiny.GLIMMER, loss)(tiny.params(tiny.GLIMMER), tiny.batch())
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads["decoder"]))
    assert np.asarray(grads["reranker"]["kernel"]).any()


@pytest.mark.parametrize(
    ("loss", "batch", "match"),
    [
        (LossConfig(), dict(passages=1), "DISTILLATION_WEIGHT.*K=1.*DISTILLATION_WEIGHT=0"),
        (
            LossConfig(distillation_weight=0, supervised_weight=0.5),
            dict(gold=False),
            "SUPERVISED_WEIGHT=0.5 .*gold_passages.*Set it to 0",
        ),
    ],
)
def test_loss_terms_without_their_data_are_rejected(loss, batch, match):
    config = dataclasses.replace(tiny.GLIMMER, num_kept=1)
    with pytest.raises(ValueError, match=match):
        GlimmerModel(config, loss).loss_fn(tiny.params(config), tiny.batch(**batch), None)


def test_rows_without_an_answer_teach_the_scores_nothing():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch(gold=False)
    unanswered = {**batch, "decoder_target_tokens": batch["decoder_target_tokens"].copy()}
    weights = batch["decoder_loss_weights"].copy()
    rows = np.array([0, 3])
    assert ((batch["passage_tokens"][rows] > 0).any(-1).sum(-1) >= 2).all()
    weights[rows], unanswered["decoder_target_tokens"][rows] = 0, 0
    unanswered["decoder_loss_weights"] = weights
    kept = np.setdiff1d(np.arange(tiny.B), rows)
    model = tiny.model(tiny.GLIMMER, TEACHING)
    without = {name: value[kept] for name, value in batch.items()}
    counts = [float(model.loss_normalizers(b)["questions"]) for b in (batch, unanswered, without)]
    assert counts[0] - 2 == counts[1] == counts[2]
    run = tiny.loss_and_grad(tiny.GLIMMER, TEACHING)
    (loss, metrics), grads = run(params, unanswered)
    (wanted, expected), wanted_grads = run(params, without)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["distillation"], expected["distillation"], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
