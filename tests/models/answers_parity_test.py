"""Greedy and beam answers, token for token those of Hugging Face's PyTorch T5, to a hundred prompts.

The golden holds what PyTorch generated, for where there is none. To rewrite it:

    GLIMMER_REWRITE_GOLDENS=1 python -m pytest tests/models/answers_parity_test.py
"""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from tests.models import tiny
from tests.models.torch_t5 import build

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "answers.npz"
KINDS = {
    "v1.1": tiny.FID,
    "v1.0": dataclasses.replace(
        tiny.FID, t5=dataclasses.replace(tiny.T5, mlp_activations=("relu",), tie_output=True)
    ),
}
PROMPTS, LONGEST, LENGTH = 100, 20, 10
# Without a penalty: Hugging Face's is another function of the length than T5X's.
SEARCHES = {
    "greedy": (DecodeConfig(), dict(num_beams=1)),
    "beam": (
        DecodeConfig(beams=4, length_penalty=0.0),
        dict(num_beams=4, length_penalty=0.0, early_stopping="never"),
    ),
}


def params(kind):
    """With an end token so likely that answers end at all lengths."""
    made = tiny.params(KINDS[kind], seed=7)
    decoder, embedding = made["decoder"], made["token_embedder"]["embedding"]
    if KINDS[kind].t5.tie_output:
        # Were it as large as what the layers add, every token would be followed by itself.
        embedding *= 0.2
        embedding[1] *= 1.5
        decoder["decoder_norm"]["scale"] *= 4.0
    else:
        decoder["logits_dense"]["kernel"][:, 1] *= 1.5
    return made


def prompts():
    """int32 `[100, 20]`, left-aligned, of 5 to 20 tokens."""
    random = np.random.default_rng(11)
    tokens = random.integers(2, tiny.V, (PROMPTS, LONGEST)).astype(np.int32)
    tokens[np.arange(LONGEST) >= random.integers(5, LONGEST + 1, PROMPTS)[:, None]] = 0
    return tokens


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """(kind, search -> PyTorch's answers, int32 `[100, 10]`)."""
    kind = request.param
    torch, model = build(params(kind), KINDS[kind])
    tokens = torch.tensor(prompts().astype(np.int64))

    def run(search):
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=(tokens > 0).long(),
                max_new_tokens=LENGTH,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                **SEARCHES[search][1],
            ).numpy()[:, 1:]
        # Beams are filled up with end tokens where padding is 0; ours with 0.
        behind = np.cumsum(out == 1, axis=1) - (out == 1) > 0
        return np.pad(np.where(behind, 0, out), ((0, 0), (0, LENGTH - out.shape[1])))

    return kind, run


@pytest.mark.parity
@pytest.mark.parametrize("search", SEARCHES)
def test_the_golden_is_what_torch_generates(pair, search):
    kind, generate = pair
    answers, name = generate(search), f"{kind} {search}"
    if os.environ.get("GLIMMER_REWRITE_GOLDENS") == "1":
        stored = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
        np.savez_compressed(GOLDEN, **{**stored, name: answers.astype(np.uint8)})
    np.testing.assert_array_equal(np.load(GOLDEN)[name], answers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
def test_answers_are_those_of_torch_token_for_token(search, kind):
    tokens = prompts()
    batch = {
        "question_tokens": tokens[:, :4],
        "passage_tokens": tokens[:, None, 4:],
        "decoder_input_tokens": np.zeros((PROMPTS, LENGTH), np.int32),
    }
    model = GlimmerModel(KINDS[kind], decode=SEARCHES[search][0])
    predict = jax.jit(model.predict_batch, compiler_options=tiny.QUICK)
    want = np.load(GOLDEN)[f"{kind} {search}"]
    np.testing.assert_array_equal(predict(params(kind), batch), want)
    # Not all alike: answers of every length, and many tokens.
    assert len(set((want > 0).sum(1))) > LENGTH // 2
    assert len(np.unique(want)) > tiny.V // 2
