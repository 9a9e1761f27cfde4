"""FiDO's decoder: sparse cross-attention and few key heads, scanned and unrolled, cached and full."""

import dataclasses

import jax
import numpy as np
import pytest

from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.fido import convert_decoder
from glimmer_jax.models.recut import recut
from glimmer_jax.models.stacking import stack_layers, unstack_layers
from glimmer_jax.nn.attention import attend
from tests.models import tiny

T5 = dataclasses.replace(
    tiny.T5, num_decoder_layers=4, cross_attention_period=2, decoder_kv_heads=2, decoder_mlp_dim=24
)
FIDO = dataclasses.replace(tiny.GLIMMER, t5=T5)
LOOPED = dataclasses.replace(FIDO, t5=dataclasses.replace(T5, scan_layers=False))
# Deeper than the encoder, and wider in everything.
LARGE = dataclasses.replace(
    tiny.GLIMMER,
    t5=dataclasses.replace(
        T5,
        num_decoder_layers=6,
        decoder_num_heads=8,
        decoder_head_dim=6,
        decoder_mlp_dim=48,
    ),
)
LARGE_LOOPED = dataclasses.replace(LARGE, t5=dataclasses.replace(LARGE.t5, scan_layers=False))
PAIRS = pytest.mark.parametrize(
    "scanned, looped", [(FIDO, LOOPED), (LARGE, LARGE_LOOPED)], ids=["small", "large"]
)
ROWS = 3


def test_fewer_key_heads_are_those_heads_repeated():
    random = np.random.default_rng(0)
    query, key, value = (
        random.normal(size=(2, 5, heads, 3)).astype(np.float32) for heads in (4, 2, 2)
    )
    mask = np.ones((2, 1, 1, 5), bool)
    got = attend(query, key, value, mask)
    want = attend(query, np.repeat(key, 2, axis=2), np.repeat(value, 2, axis=2), mask)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_only_every_second_layer_has_cross_attention():
    decoder = unstack_layers(tiny.params(FIDO))["decoder"]
    attending = ["encoder_decoder_attention" in decoder[f"layers_{i}"] for i in range(4)]
    assert attending == [False, True, False, True]
    key = decoder["layers_1"]["encoder_decoder_attention"]["key"]["kernel"]
    assert key.shape == (T5.emb_dim, 2 * T5.head_dim)
    assert decoder["layers_0"]["mlp"]["wo"]["kernel"].shape == (24, T5.emb_dim)


def test_stacking_blocks_and_back_changes_nothing():
    params = tiny.params(FIDO)
    tiny.assert_trees_equal(stack_layers(unstack_layers(params)), params)


def test_a_decoder_may_be_larger_than_its_encoder():
    params = unstack_layers(tiny.params(LARGE))
    t5, decoder = LARGE.t5, params["decoder"]
    assert t5.num_decoder_layers > t5.num_encoder_layers and "layers_5" in decoder
    of_decoder, of_encoder = decoder["layers_5"], params["live_encoder"]["live_b"]["layers_0"]
    assert of_decoder["self_attention"]["query"]["kernel"].shape == (t5.emb_dim, 8 * 6)
    assert of_encoder["attention"]["query"]["kernel"].shape == (t5.emb_dim, 4 * 4)
    assert of_decoder["mlp"]["wo"]["kernel"].shape == (48, t5.emb_dim)
    assert of_encoder["mlp"]["wo"]["kernel"].shape == (32, t5.emb_dim)


@PAIRS
def test_scanned_equals_looped(scanned, looped):
    params, batch = tiny.params(scanned), tiny.batch(rows=ROWS)
    one = tiny.forward(scanned)(params, batch)[0]
    other = tiny.forward(looped)(unstack_layers(params), batch)[0]
    np.testing.assert_allclose(one, other, atol=1e-5)


@PAIRS
@pytest.mark.parametrize("is_scanned", [True, False], ids=["scanned", "looped"])
def test_cached_decoding_equals_the_full_forward_pass(scanned, looped, is_scanned):
    params = tiny.params(scanned)
    here = (scanned, params) if is_scanned else (looped, unstack_layers(params))
    tiny.assert_cached_decoding_equals(
        lambda batch: tiny.forward(scanned)(params, batch)[0], *here, rows=ROWS
    )


def test_converted_heads_are_means_and_converted_models_run():
    plain = dataclasses.replace(
        FIDO,
        t5=dataclasses.replace(T5, cross_attention_period=1, decoder_kv_heads=None),
    )
    params = tiny.params(plain)
    made = recut(params, plain, FIDO)
    shapes = jax.tree.map(lambda leaf: leaf.shape, tiny.abstract(FIDO)[0])
    assert jax.tree.map(lambda leaf: leaf.shape, made) == shapes
    before = unstack_layers(params)["decoder"]["layers_3"]["self_attention"]["key"]["kernel"]
    after = unstack_layers(made)["decoder"]["layers_3"]["self_attention"]["key"]["kernel"]
    want = before.reshape(T5.emb_dim, 2, 2, T5.head_dim).mean(2).reshape(T5.emb_dim, -1)
    np.testing.assert_allclose(after, want, atol=1e-6)
    logits = tiny.forward(FIDO)(made, tiny.batch(rows=ROWS))[0]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(decoder_kv_heads=4), "decoder_kv_heads=4 .*period=2 .* 2 and 2"),
        (dict(cross_attention_period=1), "decoder_kv_heads=2 .*period=1 .* 2 and 2"),
        (dict(decoder_mlp_dim=32), "mlp_dim=32.*decoder_kv_heads"),
    ],
)
def test_conversions_that_need_new_parameters_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        convert_decoder(tiny.params(FIDO)["decoder"], T5, dataclasses.replace(T5, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cross_attention_period=3), "cross_attention_period=3 .*num_decoder_layers=4"),
        (dict(decoder_kv_heads=3), "decoder_kv_heads=3 .* 4 heads"),
        (dict(decoder_num_heads=0), "decoder_num_heads.* got 0"),
    ],
)
def test_incompatible_settings_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(T5, **change)


def test_the_count_of_cost_follows():
    sizes = dict(passages=3, question=4, passage=6, answer=5)
    cost, plain = (
        question_cost(dataclasses.replace(tiny.GLIMMER, t5=t5), **sizes)
        for t5 in (T5, dataclasses.replace(tiny.T5, num_decoder_layers=4))
    )
    # Half of the layers attend, with half of the key heads.
    assert cost.cross * 4 == plain.cross
    assert cost.answer < plain.answer and cost.rerank == plain.rerank
