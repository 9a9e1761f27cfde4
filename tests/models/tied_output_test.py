"""An output layer that is the embedding (T5 1.0) is an untied one with the same numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models import tiny


@pytest.mark.parametrize("scan_layers", [True, False])
def test_tied_logits_and_answers_are_those_of_the_scaled_embedding(scan_layers):
    t5 = dataclasses.replace(tiny.T5, mlp_activations=("relu",), scan_layers=scan_layers)
    untied = dataclasses.replace(tiny.FID, t5=t5)
    tied = dataclasses.replace(tiny.FID, t5=dataclasses.replace(t5, tie_output=True))
    params = tiny.params(tied)
    assert "logits_dense" not in params["decoder"]
    kernel = params["token_embedder"]["embedding"].T / np.sqrt(tiny.T5.emb_dim)
    decoder = {**params["decoder"], "logits_dense": {"kernel": kernel}}
    batch = tiny.batch(gold=False)

    def run(config, params):
        answer = jax.jit(tiny.model(config).predict_batch, compiler_options=tiny.QUICK)
        return tiny.forward(config)(params, batch)[0], answer(params, batch)

    got, answers = run(tied, params)
    want, wanted_answers = run(untied, {**params, "decoder": decoder})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(answers, wanted_answers)
