"""Our M = 0 cut against PyTorch T5 v1.1 of Hugging Face: live, and against what it once answered.

The golden holds PyTorch's states and logits for parameters and tokens that numpy draws from a seed,
so that the same is checked where there is no PyTorch. After a change of those draws, rewrite it:

    GLIMMER_REWRITE_GOLDENS=1 python -m pytest tests/models/parity_test.py
"""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest

from glimmer_jax.models.glimmer import Glimmer
from glimmer_jax.models.selection import fuse, select
from tests.models import tiny
from tests.models.torch_t5 import build

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "parity.npz"
CONFIG = tiny.FID
# Long enough for every position bucket, the last one included.
LONG = 150
TOLERANCE = dict(rtol=0, atol=1e-4)


@functools.cache
def params():
    return tiny.params(CONFIG, seed=7)


def random_batch(passages):
    random = np.random.default_rng(passages)
    question = random.integers(2, tiny.V, (2, tiny.Q)).astype(np.int32)
    question[0, :2] = 0
    passage = random.integers(2, tiny.V, (2, passages, LONG)).astype(np.int32)
    lengths = random.integers(1, LONG, (2, passages))
    lengths[1, 0] = LONG
    passage[np.arange(LONG) >= lengths[..., None]] = 0
    return {
        "question_tokens": question,
        "passage_tokens": passage,
        "decoder_input_tokens": random.integers(0, tiny.V, (2, 40)).astype(np.int32),
    }


PLAIN, FUSED = random_batch(1), random_batch(3)


@jax.jit
def ours(params, batch):
    """Encoder states of real tokens `[B, S, D]` (others zero), their mask, and logits."""

    def run(module, batch):
        live = module.rerank(batch)
        states, mask, _ = select(live, None)
        encoded, mask = fuse(module.read(states, mask), mask)
        return encoded, mask, module.decode(encoded, mask, batch["decoder_input_tokens"])

    return Glimmer(CONFIG).apply({"params": params}, batch, method=run)


def texts(batch, row):
    """The unpadded `[question passage]` token lists of one row."""
    question = batch["question_tokens"][row]
    question = question[question > 0]
    return [np.concatenate([question, p[p > 0]]) for p in batch["passage_tokens"][row]]


def check(batch, want_states, want_logits):
    """Compares with the states of each row's real tokens, in order, and with logits."""
    encoded, mask, logits = ours(params(), batch)
    got = [np.asarray(states)[np.asarray(keep)] for states, keep in zip(encoded, mask, strict=True)]
    np.testing.assert_allclose(np.concatenate(got), want_states, **TOLERANCE)
    np.testing.assert_allclose(logits, want_logits, **TOLERANCE)
    assert np.std(want_logits) > 0.5


@pytest.fixture(scope="module")
def torch_t5():
    torch, model = build(params())
    with torch.no_grad():
        yield torch, model


def torch_plain(torch_t5, batch):
    """PyTorch's own way with one text a row: padded on the right, with an attention mask."""
    torch, model = torch_t5
    rows = [texts(batch, row)[0] for row in range(2)]
    tokens = np.zeros((2, max(map(len, rows))), np.int64)
    for row, text in enumerate(rows):
        tokens[row, : len(text)] = text
    mask = tokens > 0
    out = model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        decoder_input_ids=torch.tensor(batch["decoder_input_tokens"].astype(np.int64)),
    )
    return out.encoder_last_hidden_state.numpy()[mask], out.logits.numpy()


def torch_fid(torch_t5, batch):
    """FiD by hand: every text through the encoder alone and unpadded, states side by side."""
    torch, model = torch_t5
    states, logits = [], []
    for row in range(2):
        encoded = [
            model.encoder(input_ids=torch.tensor(text[None].astype(np.int64))).last_hidden_state
            for text in texts(batch, row)
        ]
        encoded = torch.cat(encoded, dim=1)
        decoder_input = batch["decoder_input_tokens"][row : row + 1].astype(np.int64)
        out = model(encoder_outputs=(encoded,), decoder_input_ids=torch.tensor(decoder_input))
        states.append(encoded[0].numpy())
        logits.append(out.logits[0].numpy())
    return np.concatenate(states), np.stack(logits)


@pytest.mark.parity
def test_encoder_states_and_logits_equal_torch_with_padding(torch_t5):
    check(PLAIN, *torch_plain(torch_t5, PLAIN))


@pytest.mark.parity
def test_fid_equals_torch_used_the_fid_way_on_unpadded_text(torch_t5):
    check(FUSED, *torch_fid(torch_t5, FUSED))


@pytest.mark.parity
def test_the_golden_is_what_torch_answers(torch_t5):
    answers = (*torch_plain(torch_t5, PLAIN), *torch_fid(torch_t5, FUSED))
    if os.environ.get("GLIMMER_REWRITE_GOLDENS") == "1":
        np.savez_compressed(GOLDEN, *(answer.astype(np.float32) for answer in answers))
    for stored, answer in zip(golden(), answers, strict=True):
        np.testing.assert_allclose(stored, answer, rtol=0, atol=5e-5)


def golden():
    with np.load(GOLDEN) as file:
        return [file[f"arr_{i}"] for i in range(4)]


def test_encoder_states_and_logits_equal_the_golden_with_padding():
    check(PLAIN, *golden()[:2])


def test_fid_equals_the_golden_on_unpadded_text():
    check(FUSED, *golden()[2:])
