"""Choosing passages before the last reranking layer is complete: the same answers at lower cost."""

import dataclasses

import jax
import jax.extend.core
import numpy as np
import pytest

from glimmer_jax.models.glimmer import Glimmer, GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.selection import select
from tests.models import tiny

LOOPED = dataclasses.replace(tiny.T5, scan_layers=False)
CASES = {
    "one": dict(),
    "two": dict(rerank_layers=2),
    "separate": dict(separate_reranker=True),
    "separate-two": dict(rerank_layers=2, separate_reranker=True),
    "not-gated": dict(t5=dataclasses.replace(LOOPED, mlp_activations=("relu",))),
}


def config_of(name):
    base = dict(memory_layers=1, rerank_layers=1, num_kept=2, memory_codec="f32")
    return GlimmerConfig(**{"t5": LOOPED, **base, **CASES[name]})


def whole(module, batch):
    live = module.rerank(batch)
    states, mask, kept = select(live, module.config.num_kept)
    return module.read(states, mask), mask, kept, live.scores


def chosen(module, batch):
    states, mask, kept, scores = module.choose(batch)
    return module.read(states, mask), mask, kept, scores


@pytest.mark.parametrize("name", CASES)
def test_choosing_equals_reranking_and_selecting(name):
    config = config_of(name)
    variables = {"params": tiny.params(config)}
    batch = tiny.batch(gold=False)
    batch["question_tokens"][3] = 0  # its sequences begin with their passages
    expected, got = (
        jax.jit(lambda b, m=method: Glimmer(config).apply(variables, b, method=m))(batch)
        for method in (whole, chosen)
    )
    # The scores differ between passages, and absent passages have none: there is something to
    # choose.
    finite = np.isfinite(expected[3])
    assert not finite.all() and np.std(expected[3][finite]) > 0.1
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[2], expected[2])
    np.testing.assert_allclose(got[3], expected[3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[0][got[1]], expected[0][expected[1]], rtol=1e-4, atol=1e-5)


def products(model, batch):
    """Shapes of the results of all products of a prediction."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(eqn.outvars[0].aval.shape)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner)

    params = model.abstract_variables()[0]
    walk(jax.jit(model.predict_batch).trace(params, batch).jaxpr.jaxpr)
    return found


def test_dropped_passages_use_the_feed_forward_at_one_token_only():
    length = tiny.Q + tiny.P
    batch = tiny.batch(gold=False)
    sizes = {
        scan: [
            shape[1:]
            for shape in products(
                GlimmerModel(
                    dataclasses.replace(
                        tiny.GLIMMER, t5=dataclasses.replace(tiny.T5, scan_layers=scan)
                    )
                ),
                batch,
            )
            if shape[-1] == tiny.T5.mlp_dim
        ]
        for scan in (True, False)
    }
    every, scored, kept = (3, length, 32), (3, 1, 32), (2, length, 32)
    assert every in sizes[True]
    assert every not in sizes[False] and scored in sizes[False] and kept in sizes[False]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_passages_read_in_chunks_give_the_same_answers(chunk):
    config = dataclasses.replace(tiny.LUMEN, t5=LOOPED)
    params, batch = tiny.params(config), tiny.batch(passages=4, gold=False)

    def answer(read_chunk):
        model = GlimmerModel(dataclasses.replace(config, read_chunk=read_chunk))
        return jax.jit(model.predict_batch_with_aux)(params, batch)

    (tokens, aux), (expected_tokens, expected) = answer(chunk), answer(None)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(aux["scores"], expected["scores"], rtol=1e-5, atol=1e-5)


def test_a_chunk_of_no_passages_is_rejected():
    with pytest.raises(ValueError, match="read_chunk.* got 0"):
        dataclasses.replace(tiny.LUMEN, read_chunk=0)
