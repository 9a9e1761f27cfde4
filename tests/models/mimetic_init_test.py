"""The start for small models: equal tokens attend to each other, what they say comes through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.mimetic_init import mimetic_init
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.stacking import stack_layers
from tests.models import tiny

T5 = dataclasses.replace(
    tiny.T5, vocab_size=64, emb_dim=32, head_dim=8, num_encoder_layers=3, scan_layers=False
)
SETTINGS = {
    "fid": GlimmerConfig(T5),
    "lumen": GlimmerConfig(T5, 2, freeze_memory=True, share_question_encoder=False),
    "glimmer": GlimmerConfig(T5, 1, 1, num_kept=2),
    "one table": GlimmerConfig(T5, 1, 1, share_position_table=True),
}


def fresh(config):
    shapes = {
        "question_tokens": (1, 4),
        "passage_tokens": (1, 2, 4),
        "decoder_input_tokens": (1, 4),
    }
    return GlimmerModel(config).get_initial_variables(jax.random.key(0), shapes)["params"]


@pytest.mark.parametrize("name", SETTINGS)
def test_only_values_change(name):
    params = fresh(SETTINGS[name])
    made = mimetic_init(params, T5)
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert describe(made) == describe(params)


def test_every_token_of_a_text_attends_most_to_its_equals():
    params = mimetic_init(fresh(SETTINGS["glimmer"]), T5)
    x = params["token_embedder"]["embedding"]
    x = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))
    for attention in (
        params["memory_encoder"]["layers_0"]["attention"],
        params["live_encoder"]["live_b"]["layers_0"]["attention"],
        params["decoder"]["layers_1"]["encoder_decoder_attention"],
    ):
        logits = (x @ attention["query"]["kernel"]) @ (x @ attention["key"]["kernel"]).T
        np.testing.assert_array_equal(np.argmax(logits, -1), np.arange(len(x)))


def test_what_is_attended_to_is_the_output_that_is_likeliest():
    params = mimetic_init(fresh(SETTINGS["glimmer"]), T5)
    attention = params["decoder"]["layers_0"]["encoder_decoder_attention"]
    embedding = params["token_embedder"]["embedding"]
    read = embedding @ attention["value"]["kernel"] @ attention["out"]["kernel"]
    np.testing.assert_allclose(read, embedding, atol=1e-4)
    logits = read @ params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(np.argmax(logits, -1), np.arange(len(embedding)))


def test_two_heads_attend_to_neighbours_and_the_last_far_back():
    config = SETTINGS["glimmer"]
    before, after = fresh(config), mimetic_init(fresh(config), T5)
    for stack in ("memory_encoder", "live_encoder"):
        module_table = [p[stack]["relpos_bias"]["rel_embedding"] for p in (before, after)]
        assert np.argwhere(np.asarray(module_table[1] - module_table[0])).tolist() == [
            [0, 1],
            [1, 17],
            *([3, bucket] for bucket in range(8, 16)),
        ]


def test_all_decoder_heads_but_the_last_attend_to_previous_tokens():
    config = SETTINGS["glimmer"]
    before, after = fresh(config), mimetic_init(fresh(config), T5)
    tables = [p["decoder"]["relpos_bias"]["rel_embedding"] for p in (before, after)]
    changed = np.argwhere(np.asarray(tables[1] - tables[0]))
    assert changed.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_in_the_last_head_of_an_encoder_place_comes_before_likeness():
    params = mimetic_init(fresh(SETTINGS["glimmer"]), T5)
    for part, share in (("live_encoder", 0.3), ("decoder", 1.0)):
        tree = params[part]["live_a"] if part == "live_encoder" else params[part]
        attention = tree["layers_0"]["attention" if part == "live_encoder" else "self_attention"]
        query, key = attention["query"]["kernel"], attention["key"]["kernel"]
        np.testing.assert_allclose(query[:, -8:] * np.sqrt(8), share * key[:, -8:], rtol=1e-5)
        np.testing.assert_allclose(query[:, :-8] * np.sqrt(8), key[:, :-8], rtol=1e-5)


def test_scanned_layers_start_as_looped_ones():
    params = fresh(SETTINGS["glimmer"])
    scanned = dataclasses.replace(T5, scan_layers=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        stack_layers(mimetic_init(params, T5)),
        mimetic_init(stack_layers(params), scanned),
    )


def test_two_heads_are_rejected():
    with pytest.raises(ValueError, match="num_heads >= 3.*relpos_buckets >= 8.*got 2 and 32"):
        mimetic_init({}, dataclasses.replace(T5, num_heads=2))
