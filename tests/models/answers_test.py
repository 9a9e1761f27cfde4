"""Answers drawn, and answers chosen from candidates, through the model."""

import dataclasses

import jax
import numpy as np
import pytest

from glimmer_jax.models import answers
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.models.stacking import unstack_layers
from tests.models import tiny

ROWS = 3
LOOPED = dataclasses.replace(tiny.GLIMMER, t5=dataclasses.replace(tiny.T5, scan_layers=False))


def predict(config, decode=DecodeConfig()):
    model = GlimmerModel(config, decode=decode)
    return jax.jit(model.predict_batch_with_aux, compiler_options=tiny.QUICK)


def candidates(seed, count):
    """int32 `[B, N, T]` of different lengths; the last of row 0 is absent."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, tiny.V, (ROWS, count, tiny.T)).astype(np.int32)
    lengths = random.integers(1, tiny.T + 1, (ROWS, count, 1))
    tokens[np.arange(tiny.T) >= lengths] = 0
    tokens[0, -1] = 0
    return tokens


@pytest.mark.parametrize(
    "config, at_a_time", [(tiny.GLIMMER, 64), (LOOPED, 2)], ids=["scanned", "looped_in_parts"]
)
def test_the_most_probable_candidate_is_the_answer(monkeypatch, config, at_a_time):
    monkeypatch.setattr(answers, "CANDIDATE_CHUNK", at_a_time)
    params = tiny.params(tiny.GLIMMER)
    here = params if config is tiny.GLIMMER else unstack_layers(params)
    batch, given = tiny.batch(rows=ROWS), candidates(0, 5)
    tokens, aux = predict(config)(here, dict(batch, candidate_tokens=given))

    # What the full forward pass, fed with each candidate, says.
    score = jax.jit(tiny.model(tiny.GLIMMER).score_batch, compiler_options=tiny.QUICK)
    want = np.stack(
        [
            score(
                params,
                dict(
                    batch,
                    decoder_input_tokens=np.pad(one, ((0, 0), (1, 0)))[:, :-1],
                    decoder_target_tokens=one,
                    decoder_loss_weights=(one > 0).astype(np.float32),
                ),
            )
            for one in np.moveaxis(given, 1, 0)
        ],
        axis=1,
    )
    want[0, -1] = -np.inf
    np.testing.assert_allclose(aux["candidate_scores"], want, rtol=1e-4)
    best = want.argmax(axis=1)
    assert len(set(best)) > 1
    np.testing.assert_array_equal(tokens, given[np.arange(ROWS), best])
    np.testing.assert_allclose(aux["scores"], want.max(axis=1), rtol=1e-4)
    assert aux["kept_passages"].shape == (ROWS, config.num_kept)


def test_draws_follow_the_key_and_one_token_to_draw_from_is_greedy():
    params, batch = tiny.params(tiny.GLIMMER), tiny.batch(rows=ROWS)
    draw = predict(tiny.GLIMMER, DecodeConfig(temperature=2.0, top_p=0.99))
    one, again, other = (draw(params, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    tiny.assert_trees_equal(one, again)
    assert (np.asarray(one[0]) != np.asarray(other[0])).any()
    greedy = predict(tiny.GLIMMER)(params, batch)
    first = predict(tiny.GLIMMER, DecodeConfig(temperature=2.0, top_k=1))
    tiny.assert_trees_close(first(params, batch, jax.random.key(0)), greedy)


def test_sampling_without_a_key_is_rejected():
    model = GlimmerModel(tiny.GLIMMER, decode=DecodeConfig(temperature=0.5))
    with pytest.raises(ValueError, match="temperature=0.5 .*rng"):
        jax.eval_shape(model.predict_batch, tiny.abstract(tiny.GLIMMER)[0], tiny.batch(rows=ROWS))


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(beams=0), "beams.* got 0"),
        (dict(length_penalty=-1.0), "length_penalty.* got -1.0"),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=1.0, top_k=-1), "top_k=-1"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0.0"),
        (dict(temperature=1.0, beams=2), "temperature=1.0 .*beams=2"),
        (dict(top_k=3), "top_k=3 .*Set a temperature"),
        (dict(top_p=0.5), "top_p=0.5 .*Set a temperature"),
    ],
)
def test_contradicting_decode_settings_are_rejected(settings, match):
    with pytest.raises(ValueError, match=match):
        DecodeConfig(**settings)
