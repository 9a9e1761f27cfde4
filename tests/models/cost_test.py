"""Counted cost against GLIMMER (arXiv 2306.10231), section on cost, for T5-Large."""

import dataclasses

import pytest

from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config

D, L = 1024, 24
# T5-Large with the feed-forward that makes a layer 12 D^2: 3 F = 8 D, to one part in 8,192.
LARGE = T5Config(32128, D, 16, 64, 2731, L, L)
FID = GlimmerConfig(LARGE)
LUMEN = GlimmerConfig(LARGE, memory_layers=16)
SLOTS = dict(question=48, passage=304, answer=32)


def glimmer(kept):
    return GlimmerConfig(LARGE, memory_layers=16, rerank_layers=2, num_kept=kept)


@pytest.mark.parametrize(
    "config, tera",
    [(FID, 4.97), (LUMEN, 2.14), (glimmer(25), 1.47), (glimmer(10), 0.81), (glimmer(5), 0.59)],
)
def test_multiply_adds_of_a_question_are_the_papers(config, tera):
    cost = question_cost(config, passages=40, **SLOTS)
    # The paper leaves the question's own way through the memory encoder out.
    assert (cost.total - cost.question) / 1e12 == pytest.approx(tera, abs=0.006)


def test_the_question_through_the_memory_encoder_is_counted_once():
    layer = 4 * D * D + 3 * D * 2731
    assert question_cost(FID, passages=40, **SLOTS).question == 0
    for config in (LUMEN, glimmer(25)):
        cost = question_cost(config, passages=40, **SLOTS)
        assert cost.question == 48 * 16 * layer
        assert cost.precompute == 304 * 16 * layer


def test_cost_follows_the_formulas_exactly():
    k, kept, n, answer = 40, 25, 352, 32
    layer, attention = 4 * D * D + 3 * D * 2731, D * D
    decoder = answer * L * (2 * attention + layer)
    assert question_cost(FID, passages=k, **SLOTS).total == (
        k * n * L * (layer + 2 * attention) + decoder
    )
    lumen = kept * n * (8 * layer + L * 2 * attention) + decoder
    cost = question_cost(glimmer(kept), passages=k, **SLOTS)
    assert cost.total - cost.question == lumen + (k - kept) * n * 2 * layer
    assert cost.tflop == cost.total / 1e12


def test_a_separate_reranker_costs_its_layers_on_top():
    built_in, separate = (
        question_cost(config, passages=40, **SLOTS)
        for config in (glimmer(25), dataclasses.replace(glimmer(25), separate_reranker=True))
    )
    layer = 4 * D * D + 3 * D * 2731
    assert separate.total - built_in.total == 25 * 352 * 2 * layer


def test_no_more_is_kept_than_there_is():
    assert (
        question_cost(glimmer(25), passages=5, **SLOTS).total
        == question_cost(glimmer(5), passages=5, **SLOTS).total
    )


def test_a_plain_feed_forward_has_two_projections():
    plain = dataclasses.replace(LARGE, mlp_activations=("relu",))
    cost = question_cost(GlimmerConfig(plain), passages=1, question=1, passage=0, answer=1)
    assert cost.read == L * (4 * D * D + 2 * D * 2731)
