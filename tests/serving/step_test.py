"""The two programs of an answer on an fsdp mesh, and candidate answers as tokens."""

import types

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.models import model as models
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight import hlo
from glimmer_jax.serving.step import add_candidates, answer_step, encode_candidates
from tests.models import tiny

# Every letter is a piece; spaces are none.
VOCABULARY = types.SimpleNamespace(
    encode=lambda text: [ord(c) for c in text.replace(" ", "")], eos_id=1
)


def test_candidates_end_and_are_filled_up():
    got = encode_candidates(["no", "yes"], VOCABULARY, 5)
    want = [[ord("n"), ord("o"), 1, 0, 0], [ord("y"), ord("e"), ord("s"), 1, 0]]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.int32


def test_every_question_of_a_batch_gets_them():
    batch = {"question_tokens": np.zeros((3, 4), np.int32)}
    tokens = encode_candidates(["no", "yes"], VOCABULARY, 5)
    got = add_candidates(batch, tokens)
    np.testing.assert_array_equal(got["candidate_tokens"], [tokens] * 3)
    assert add_candidates(batch, None) is batch


@pytest.mark.parametrize(
    "candidates, match",
    [
        ([], "CANDIDATES is an empty list"),
        ("yes", r"CANDIDATES is a list of answers, .*got 'yes'"),
        ([1, 2], r"CANDIDATES is a list of answers, .*got \[1, 2\]"),
        (["yes", " "], "Candidate 1 of CANDIDATES, ' ', is empty"),
        (["yes", "maybe"], r"'maybe' of CANDIDATES has 6 tokens, .* answers have 5. Shorten it"),
        (["yes", "no", "ye s"], "'yes' and 'ye s' of CANDIDATES have the same tokens"),
    ],
)
def test_invalid_candidates_are_reported(candidates, match):
    with pytest.raises(ValueError, match=match):
        encode_candidates(candidates, VOCABULARY, 5)


@pytest.mark.parametrize("gathered", [True, False], ids=["once", "control"])
def test_no_kernel_is_gathered_for_every_token(gathered, monkeypatch):
    if not gathered:
        monkeypatch.setattr(models, "gather_fsdp", lambda tree, names: tree)
    model = tiny.model(tiny.GLIMMER)
    shapes, names = model.abstract_variables()
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    rows = partitioning.batch_sharding(mesh)

    def placed(info, sharding):
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)

    # Frozen, as T5X passes them.
    params = flax.core.freeze(jax.tree.map(placed, shapes, partitioning.shardings(names, mesh)))
    length = tiny.GLIMMER.num_kept * (tiny.Q + tiny.P)
    width = tiny.T5.emb_dim
    encoded = jax.ShapeDtypeStruct((tiny.B, length, width), jnp.float32, sharding=rows)
    mask = jax.ShapeDtypeStruct((tiny.B, length), bool, sharding=rows)
    numbers = (np.uint32(0), np.uint32(0), tiny.T)
    with jax.set_mesh(mesh):
        program = answer_step(model).lower(params, encoded, mask, None, *numbers).compile()
    # The smallest kernel is [16, 16], in float32.
    in_loop = [
        one
        for one in hlo.collectives(program.as_text())
        if one.kind == "all-gather" and one.in_loop and one.size >= 4 * width * width
    ]
    assert bool(in_loop) is not gathered
