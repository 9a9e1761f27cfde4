"""Candidate answers as tokens."""

import types

import numpy as np
import pytest

from glimmer_jax.serving.step import add_candidates, encode_candidates

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
