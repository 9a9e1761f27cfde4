"""Memory from the store and memory on the fly are one model; frozen memory stays as it is."""

import dataclasses

import jax
import numpy as np
import pytest

from glimmer_jax.models.model import GlimmerModel
from tests.models import tiny

BF16 = dataclasses.replace(tiny.GLIMMER, memory_codec="bf16")


def as_memory(encode, params, batch):
    """The batch with its passages' tokens replaced by what a store would hold of them."""
    tokens = batch["passage_tokens"]
    flat = encode(params, tokens.reshape(-1, tiny.P))
    out = {key: value for key, value in batch.items() if key != "passage_tokens"}
    out["passage_memory"] = {k: v.reshape(*tokens.shape, -1) for k, v in flat.items()}
    out["passage_lengths"] = (tokens > 0).sum(-1).astype(np.int32)
    return out


def test_stored_memory_equals_memory_computed_on_the_fly_bit_for_bit():
    model = GlimmerModel(BF16)
    params, batch = tiny.params(BF16), tiny.batch()
    # As users compile it: with all the compiler's liberties.
    run = jax.jit(lambda p, b: model.module.apply({"params": p}, b))
    stored = as_memory(jax.jit(model.encode_memory), params, batch)
    assert stored["passage_memory"]["states"].dtype == jax.numpy.bfloat16
    from_tokens, from_store = run(params, batch), run(params, stored)
    np.testing.assert_array_equal(from_store[0], from_tokens[0])
    np.testing.assert_array_equal(from_store[1].scores, from_tokens[1].scores)
    np.testing.assert_array_equal(from_store[2], from_tokens[2])
    # And the rounding is there: without it the answers are others, a little.
    exact = tiny.forward(tiny.GLIMMER)(params, batch)[0]
    assert 1e-5 < np.abs(exact - from_tokens[0]).max() < 0.5


def test_the_question_is_not_rounded():
    params, batch = tiny.params(BF16), tiny.batch()
    states, exact = (
        tiny.model(config).module.apply(
            {"params": params}, batch["question_tokens"], method="encode_question"
        )
        for config in (BF16, tiny.GLIMMER)
    )
    np.testing.assert_array_equal(states, exact)
    assert (states != states.astype(jax.numpy.bfloat16).astype(np.float32)).any()


def test_memory_is_rounded_to_its_stored_type_at_the_cut():
    params, batch = tiny.params(BF16), tiny.batch()
    states, mask = tiny.model(BF16).module.apply({"params": params}, batch, method="passage_states")
    exact, _ = tiny.model(tiny.GLIMMER).module.apply(
        {"params": params}, batch, method="passage_states"
    )
    np.testing.assert_array_equal(states, exact.astype(jax.numpy.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(mask, batch["passage_tokens"] > 0)


def test_fid_rounds_nothing():
    config = dataclasses.replace(tiny.FID, memory_codec="bf16")
    params, batch = tiny.params(config), tiny.batch()
    states, _ = tiny.model(config).module.apply({"params": params}, batch, method="passage_states")
    np.testing.assert_array_equal(
        states, params["token_embedder"]["embedding"][batch["passage_tokens"]]
    )


@pytest.fixture(scope="module")
def frozen_gradient():
    grad = tiny.loss_and_grad(tiny.FROZEN, tiny.LIGHT_LOSS)
    return grad(tiny.params(tiny.FROZEN), tiny.batch())[1]


def test_frozen_memory_gets_no_gradient_at_all(frozen_gradient):
    for name in ("memory_encoder", "memory_embedder"):
        for leaf in jax.tree.leaves(frozen_gradient[name]):
            assert not np.asarray(leaf).any()


def test_beside_frozen_memory_everything_else_is_trained(frozen_gradient):
    trained = {k: v for k, v in frozen_gradient.items() if not k.startswith("memory")}
    assert "question_encoder" in trained
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_frozen_names_exactly_what_is_not_trained(frozen_gradient):
    model = tiny.model(tiny.FROZEN)
    frozen = model.frozen(frozen_gradient)
    for key, subtree in frozen.items():
        want = key in ("memory_encoder", "memory_embedder")
        assert all(leaf is want for leaf in jax.tree.leaves(subtree))
    assert not any(jax.tree.leaves(tiny.model(tiny.GLIMMER).frozen(tiny.abstract(tiny.GLIMMER)[0])))


def test_frozen_memory_reads_its_own_embedding_and_no_other():
    params = tiny.params(tiny.FROZEN)
    model, tokens = tiny.model(tiny.FROZEN), tiny.batch()["passage_tokens"][0]
    before = model.encode_memory(params, tokens)["states"]
    moved = dict(params, token_embedder={"embedding": params["token_embedder"]["embedding"] + 1})
    np.testing.assert_array_equal(model.encode_memory(moved, tokens)["states"], before)
    moved = dict(params, memory_embedder={"embedding": params["memory_embedder"]["embedding"] + 1})
    assert (model.encode_memory(moved, tokens)["states"] != before).any()


def test_frozen_memory_is_the_same_with_dropout():
    t5 = dataclasses.replace(tiny.T5, dropout_rate=0.5)
    params, batch = tiny.params(tiny.FROZEN), tiny.batch()
    for config, same in ((tiny.FROZEN, True), (tiny.GLIMMER, False)):
        module = tiny.model(dataclasses.replace(config, t5=t5)).module
        params = tiny.params(config)
        plain, dropped = (
            module.apply({"params": params}, batch, method="passage_states", rngs=rngs)[0]
            for rngs in (None, {"dropout": jax.random.key(0)})
        )
        assert bool((plain == dropped).all()) == same


def test_training_from_memory_needs_a_frozen_encoder():
    batch = dict(tiny.batch(), passage_memory={})
    with pytest.raises(ValueError, match="memory.*freeze_memory=True"):
        tiny.model(tiny.GLIMMER).loss_fn({}, batch, None)


def test_training_from_frozen_memory_equals_training_from_tokens():
    model = tiny.model(tiny.FROZEN, tiny.LIGHT_LOSS)
    params, batch = tiny.params(tiny.FROZEN), tiny.batch()
    stored = as_memory(jax.jit(model.encode_memory), params, batch)
    run = jax.jit(lambda p, b: model.loss_fn(p, b, None), compiler_options=tiny.QUICK)
    tiny.assert_trees_close(run(params, stored), run(params, batch), rtol=1e-6)


def test_fid_has_no_memory_to_build():
    with pytest.raises(ValueError, match=r"memory_layers is 0.*LUMEN or GLIMMER"):
        tiny.model(tiny.FID).encode_memory({}, np.zeros((1, 4), np.int32))


def test_memory_specs_are_those_of_what_is_encoded():
    model = tiny.model(BF16)
    arrays = jax.eval_shape(
        model.encode_memory, tiny.abstract(BF16)[0], np.zeros((2, tiny.P), np.int32)
    )
    assert {k: (v.shape[2:], v.dtype) for k, v in arrays.items()} == model.memory_specs()
