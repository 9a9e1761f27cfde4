"""Parameters laid out for serving: other forms of the same numbers, the same answers."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.models.answers import DecodeConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.serving import param_layout
from tests.models import tiny

SETTINGS = {
    "float32": {},
    "operands": {"matmul_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "tied": {"matmul_dtype": "bfloat16", "tie_output": True},
    "fido": {"cross_attention_period": 2, "decoder_kv_heads": 1, "matmul_dtype": "bfloat16"},
}


def model_of(name, beams=1):
    t5 = dataclasses.replace(tiny.T5, **SETTINGS[name])
    return GlimmerModel(dataclasses.replace(tiny.GLIMMER, t5=t5), decode=DecodeConfig(beams=beams))


def prepared(model, rows):
    made, params = looped(model)
    return made, param_layout.lay_out(made, jax.tree.map(jnp.asarray, params), rows, "cpu")


def looped(model):
    params = param_layout.unstack(model, tiny.params(model.config))
    return param_layout.unrolled(model, "cpu"), params


def answers(model, params, batch):
    run = jax.jit(model.predict_batch_with_aux, compiler_options=tiny.QUICK)
    tokens, aux = run(params, batch)
    return np.asarray(tokens), np.asarray(aux["scores"]), np.asarray(aux["passage_scores"])


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_laid_out_give_the_same_answers(name):
    model = model_of(name)
    batch = tiny.batch(gold=False)
    expected = answers(*looped(model), batch)
    for rows in (1, 8):
        got = answers(*prepared(model, rows), batch)
        np.testing.assert_array_equal(got[0], expected[0])
        # Sums in another order, which the next product may round to the other side.
        tolerance = 1e-5 if name == "float32" else 2e-2
        np.testing.assert_allclose(got[1], expected[1], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(got[2], expected[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["float32", "fido"])
def test_looped_layers_give_the_answers_of_scanned_ones(name):
    model = model_of(name)
    batch = tiny.batch(gold=False)
    expected = answers(model, tiny.params(model.config), batch)
    got = answers(*looped(model), batch)
    np.testing.assert_array_equal(got[0], expected[0])
    tolerance = 1e-4 if name == "float32" else 2e-2
    np.testing.assert_allclose(got[1], expected[1], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got[2], expected[2], rtol=tolerance, atol=tolerance)


def leaves(params):
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def test_single_token_kernels_are_stored_by_row_in_the_product_dtype():
    found = leaves(prepared(model_of("operands"), 1)[1])
    own = tiny.params(param_layout.unrolled(model_of("operands"), "cpu").config)
    turned = found["decoder/layers_0/mlp/wi_0/rows"]
    assert turned.dtype == jnp.bfloat16
    kernel = own["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert turned.shape == kernel.shape[::-1]
    assert "decoder/logits_dense/rows" in found
    # Those of many rows stay as they were.
    for name in ("encoder_decoder_attention/key", "encoder_decoder_attention/value"):
        assert found[f"decoder/layers_0/{name}/kernel"].dtype == jnp.bfloat16
    assert found["live_encoder/live_a/layers_0/mlp/wi_0/kernel"].dtype == jnp.bfloat16


def test_an_array_is_freed_once_its_replacement_exists():
    made, params = looped(model_of("operands"))
    given = jax.tree.map(jnp.asarray, params)
    kernel = weakref.ref(given["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"])
    found = param_layout.lay_out(made, given, 1, "cpu")
    assert "rows" in found["decoder"]["layers_0"]["mlp"]["wi_0"]
    gc.collect()
    assert not given and kernel() is None


def test_several_questions_at_a_time_and_float32_keep_their_kernels():
    for model, rows in ((model_of("operands"), 2), (model_of("float32"), 1)):
        assert not [name for name in leaves(prepared(model, rows)[1]) if name.endswith("rows")]


def test_what_is_not_rounded_in_the_model_is_not_rounded_here():
    found = leaves(prepared(model_of("bfloat16"), 1)[1])
    assert found["decoder/logits_dense/kernel"].dtype == jnp.float32
    assert found["token_embedder/embedding"].dtype == jnp.bfloat16
    assert found["live_encoder/encoder_norm/scale"].dtype == jnp.float32
    tied = leaves(prepared(model_of("tied"), 1)[1])
    assert tied["token_embedder/embedding"].dtype == jnp.float32


def test_unrolled_parameters_are_unchanged():
    t5 = dataclasses.replace(tiny.T5, scan_layers=False)
    model = GlimmerModel(dataclasses.replace(tiny.GLIMMER, t5=t5, read_chunk=3))
    params = {"a": 1}
    assert param_layout.unstack(model, params) is params
    assert param_layout.unrolled(model, "cpu").config == model.config


def test_passages_are_encoded_in_chunks_only_on_cpus():
    for platform, chunk in (("cpu", param_layout.CPU_CHUNK), ("tpu", None)):
        assert param_layout.unrolled(model_of("float32"), platform).config.read_chunk == chunk
