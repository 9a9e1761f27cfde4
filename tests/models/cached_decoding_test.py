"""Cached decoding equals the full forward pass, scanned and looped, greedy and beams."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.models.stacking import unstack_layers
from tests.models import tiny

LOOPED = dataclasses.replace(tiny.GLIMMER, t5=dataclasses.replace(tiny.T5, scan_layers=False))
ROWS = 3
EOS = 1


@pytest.fixture(scope="module", params=["scanned", "looped"])
def setting(request):
    params = tiny.params(tiny.GLIMMER)
    # A likely end token, so that answers end at different lengths.
    kernel = params["decoder"]["logits_dense"]["kernel"].copy()
    kernel[:, EOS] *= 2
    params["decoder"]["logits_dense"]["kernel"] = kernel
    if request.param == "scanned":
        return tiny.GLIMMER, params
    return LOOPED, unstack_layers(params)


def full_logits(params, batch):
    """The full forward pass: of the scanned model alone, which the looped one has to equal."""
    return tiny.forward(tiny.GLIMMER)(params, batch)[0]


def stacked(setting):
    config, params = setting
    return (
        params
        if config is tiny.GLIMMER
        else tiny.params(tiny.GLIMMER)
        | {
            "decoder": dict(
                tiny.params(tiny.GLIMMER)["decoder"], logits_dense=params["decoder"]["logits_dense"]
            )
        }
    )


def test_cached_decoding_equals_full_forward_for_every_beam(setting):
    config, params = setting
    full = functools.partial(full_logits, stacked(setting))
    tiny.assert_cached_decoding_equals(full, config, params, rows=ROWS)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_have_the_probability_that_the_full_forward_gives_them(setting, beams):
    config, params = setting
    batch = tiny.batch(rows=ROWS)
    model = GlimmerModel(config, decode=DecodeConfig(beams=beams), eos_id=EOS)
    predict = jax.jit(model.predict_batch_with_aux, compiler_options=tiny.QUICK)
    tokens, aux = predict(params, batch)
    tokens = np.asarray(tokens)
    assert tokens.shape == (ROWS, tiny.T) and tokens.dtype == np.int32
    logits = full_logits(
        stacked(setting),
        dict(batch, decoder_input_tokens=np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]),
    )
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    ended = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) > 0
    assert not tokens[ended].any()
    chosen = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    want = np.where(ended, 0, chosen).sum(-1)
    if beams == 1:
        np.testing.assert_array_equal(tokens[~ended], log_probs.argmax(-1)[~ended])
    else:
        want = want / ((5 + (~ended).sum(-1)) / 6) ** 0.6
    np.testing.assert_allclose(aux["scores"], want, rtol=1e-4)
    assert aux["passage_scores"].shape == (ROWS, tiny.K)
    assert aux["kept_passages"].shape == (ROWS, config.num_kept)
