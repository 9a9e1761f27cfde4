"""Searches, draws and scores over a table of logits, against what numpy finds by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax import decoding

V, T, EOS, B = 4, 4, 1, 3


@functools.cache
def table(seed, spread=2.0):
    """Logits of the next token for each row, position and last token: `[B, T, V, V]`."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(B, T, V, V)) * spread).astype(np.float32)


def history_step(logits):
    """A step that trusts its cache alone: what it holds is the tokens that a beam has taken.

    The next logits depend on the last token that the cache remembers, so that a cache that is not
    moved along with its beam gives other answers. Also counts its calls.
    """
    logits = jnp.asarray(logits)

    def step(tokens, index, cache):
        seen, calls = cache["seen"], cache["calls"] + 1
        seen = jax.lax.dynamic_update_slice_in_dim(seen, tokens[None, :, :, None], index, axis=3)
        last = jax.lax.dynamic_index_in_dim(seen, index, axis=3, keepdims=False)[0]
        before = jax.lax.dynamic_index_in_dim(
            seen, jnp.maximum(index - 1, 0), axis=3, keepdims=False
        )[0]
        rows = jnp.arange(last.shape[0])[:, None]
        # The token before the last counts, too: a history that a table of the last cannot tell.
        out = logits[rows, index, last] + 0.5 * logits[rows, index, before][..., ::-1]
        return out, {"seen": seen, "calls": calls}

    def cache(beams):
        shape = (1, len(logits), beams, T)
        return {
            "seen": jnp.zeros(shape, jnp.int32),
            "calls": jnp.zeros((1, len(logits), beams), jnp.int32),
        }

    return step, cache


@jax.jit
def greedy(logits):
    step, cache = history_step(logits)
    return decoding.greedy(step, cache(1), batch=B, length=T, eos_id=EOS)


@functools.partial(jax.jit, static_argnums=(1, 2))
def beam(logits, beams, alpha):
    step, cache = history_step(logits)
    kwargs = dict(batch=B, beams=beams, length=T, eos_id=EOS, alpha=alpha, cache_offset=1)
    return decoding.beam(step, cache(beams), **kwargs)


def log_probs(logits, row, tokens):
    """Log probability of each token of a sequence, in float64."""
    out, history = [], [0]
    for index, token in enumerate(tokens):
        before = history[max(index - 1, 0)]
        x = logits[row, index, history[index]].astype(np.float64)
        x = x + 0.5 * logits[row, index, before][::-1]
        out.append((x - np.log(np.exp(x).sum()))[token])
        history.append(token)
    return np.array(out)


def hypotheses():
    """All sequences that end with EOS or fill T."""
    for n in range(1, T + 1):
        for tokens in itertools.product(range(V), repeat=n):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or n == T):
                yield tokens


@pytest.mark.parametrize("seed", range(3))
def test_greedy_takes_the_best_token_each_time_and_stops_at_the_end(seed):
    logits = table(seed)
    tokens, scores = greedy(logits)
    for row in range(B):
        want = []
        while len(want) < T and EOS not in want:
            want.append(max(range(V), key=lambda v: log_probs(logits, row, [*want, v])[-1]))
        np.testing.assert_array_equal(tokens[row], want + [0] * (T - len(want)))
        np.testing.assert_allclose(scores[row], log_probs(logits, row, want).sum(), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_hypotheses(seed, alpha):
    logits = table(seed)
    beams = 64
    tokens, scores = beam(logits, beams, alpha)
    assert tokens.shape == (B, beams, T) and scores.shape == (B, beams)
    for row in range(B):
        every = {
            h: log_probs(logits, row, h).sum() / ((5 + len(h)) / 6) ** alpha for h in hypotheses()
        }
        best = sorted(every, key=every.get)[-10:]
        for rank, want in enumerate(best, start=beams - 10):
            np.testing.assert_array_equal(tokens[row, rank], list(want) + [0] * (T - len(want)))
            np.testing.assert_allclose(scores[row, rank], every[want], rtol=1e-5)


def test_a_narrow_beam_keeps_its_cache_with_its_hypotheses():
    for seed in range(4):
        logits = table(seed)
        tokens, scores = beam(logits, 2, 0.6)
        for row, rank in itertools.product(range(B), range(2)):
            answer = [int(t) for t in tokens[row, rank]]
            answer = answer[: answer.index(EOS) + 1] if EOS in answer else answer
            want = log_probs(logits, row, answer).sum() / ((5 + len(answer)) / 6) ** 0.6
            np.testing.assert_allclose(scores[row, rank], want, rtol=1e-5)
        assert (scores[:, 1] >= scores[:, 0]).all()


def test_one_beam_without_penalty_is_greedy_or_better():
    for seed in range(3):
        tokens, scores = beam(table(seed), 1, 0.0)
        greedy_tokens, greedy_scores = greedy(table(seed))
        # A beam keeps its first finished hypothesis unless a longer one is better.
        better = np.asarray(scores[:, 0] > greedy_scores + 1e-5)
        same = (np.asarray(tokens[:, 0]) == np.asarray(greedy_tokens)).all(-1)
        assert (better | same).all()


def calls_until_stop(search, logits, width, **kwargs):
    """How many steps a search runs, counted on the host."""
    calls = []
    step, cache = history_step(logits)

    def counted(tokens, index, cache):
        jax.debug.callback(lambda i: calls.append(int(i)), index)
        return step(tokens, index, cache)

    run = jax.jit(lambda: search(counted, cache(width), batch=B, length=T, eos_id=EOS, **kwargs))
    out = jax.block_until_ready(run())
    jax.effects_barrier()
    return sorted(calls), out


def draws(step, cache, **kwargs):
    return decoding.sample(step, cache, rng=jax.random.key(0), temperature=1.0, **kwargs)


@pytest.mark.parametrize("search", [decoding.greedy, draws])
def test_a_search_runs_until_the_last_row_has_ended_and_no_longer(search):
    logits = np.zeros((B, T, V, V), np.float32)
    logits[..., 2] = 30.0
    for row, end in enumerate([0, 2, 1]):
        logits[row, end:, ..., EOS] = 60.0
    calls, (tokens, scores) = calls_until_stop(search, logits, 1)
    assert calls == [0, 1, 2]
    np.testing.assert_array_equal(tokens, [[EOS, 0, 0, 0], [2, 2, EOS, 0], [2, EOS, 0, 0]])
    want = [
        log_probs(logits, row, [int(t) for t in one if t]).sum() for row, one in enumerate(tokens)
    ]
    np.testing.assert_allclose(scores, want, atol=1e-5)


def test_a_beam_stops_as_soon_as_nothing_can_change():
    logits = np.zeros((B, T, V, V), np.float32)
    logits[..., EOS] = 30.0  # all rows end at once
    calls, _ = calls_until_stop(decoding.beam, logits, 1, beams=1, cache_offset=1)
    assert calls == [0]
    # Two beams need two ends, and the second best way is one token longer.
    calls, _ = calls_until_stop(decoding.beam, logits, 2, beams=2, cache_offset=1)
    assert calls == [0, 1]


def test_a_row_that_has_ended_is_not_changed_by_rows_that_go_on():
    logits = np.zeros((B, T, V, V), np.float32)
    logits[..., 2] = 5.0
    logits[0, ..., EOS] = 30.0
    tokens, scores = greedy(logits)
    np.testing.assert_array_equal(tokens[0], [EOS, 0, 0, 0])
    np.testing.assert_array_equal(tokens[1], [2, 2, 2, 2])
    np.testing.assert_allclose(scores[0], log_probs(logits, 0, [EOS]).sum(), atol=1e-6)


def test_length_penalty_is_that_of_gnmt():
    np.testing.assert_allclose(decoding.length_penalty(7, 0.6), (12 / 6) ** 0.6, rtol=1e-6)
    assert decoding.length_penalty(1, 0.6) == 1.0


def numpy_kept(logits, top_k, top_p):
    """Which tokens may be drawn, `[V]`, by hand."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    probs = np.exp(logits[order] - logits[order].max())
    probs /= probs.sum()
    keep = order[: np.searchsorted(np.cumsum(probs), top_p) + 1] if top_p < 1 else order
    return np.isin(np.arange(len(logits)), keep)


@pytest.mark.parametrize(
    "top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.8), (1, 1.0), (99, 0.01)]
)
def test_truncation_equals_numpy(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 2
    got = np.asarray(decoding.truncate(logits, top_k, top_p))
    for row, one in zip(got, logits, strict=True):
        keep = numpy_kept(one, top_k, top_p)
        np.testing.assert_array_equal(row, np.where(keep, one, np.float32(decoding.WORST)))


ROWS = 20_000


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def sample(first, second, temperature, top_k, top_p, seed=0):
    """Two tokens for every row, of one distribution for each position (the second by the first)."""

    def step(tokens, index, cache):
        return jnp.where(index == 0, first, second[tokens[:, 0]])[:, None], cache

    return decoding.sample(
        step,
        (),
        batch=ROWS,
        length=2,
        eos_id=EOS,
        rng=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.5, 4, 0.75)]
)
def test_draws_have_the_distribution_that_numpy_computes(temperature, top_k, top_p):
    random = np.random.default_rng(1)
    first, second = random.normal(size=(1, 5)), random.normal(size=(5, 5))
    tokens, scores = sample(np.float32(first), np.float32(second), temperature, top_k, top_p)

    def distribution(logits):
        logits = logits / temperature
        weights = np.exp(logits) * numpy_kept(logits, top_k, top_p)
        return weights / weights.sum()

    pairs = np.zeros((5, 5))
    for one in range(5):
        after = [1.0, 0, 0, 0, 0] if one == EOS else distribution(second[one])
        pairs[one] = distribution(first[0])[one] * np.asarray(after)
    found = np.zeros((5, 5))
    np.add.at(found, tuple(np.asarray(tokens).T), 1)
    assert not found[pairs == 0].any()
    expected = pairs[pairs > 0] * ROWS
    chi_square = ((found[pairs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # Five standard deviations above the mean of a chi-square.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)

    # The score is the model's own, whatever was cut.
    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    a, b = np.asarray(tokens).T
    want = log_softmax(first)[0, a] + np.where(a == EOS, 0, log_softmax(second)[a, b])
    np.testing.assert_allclose(scores, want, atol=1e-5)


def test_a_seed_determines_the_samples():
    flat = np.zeros((1, 5), np.float32), np.zeros((5, 5), np.float32)
    one, again, other = (sample(*flat, 1.0, 0, 1.0, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).mean() > 0.5


def test_draws_of_a_row_do_not_depend_on_how_many_rows_follow():
    @functools.partial(jax.jit, static_argnums=0)
    def run(rows):
        step, cache = history_step(table(0)[:rows])
        kwargs = dict(batch=rows, length=T, eos_id=EOS, rng=jax.random.key(3), temperature=2.0)
        return decoding.sample(step, cache(1), **kwargs)[0]

    np.testing.assert_array_equal(run(B)[:2], run(2))


def test_scores_of_candidates_are_their_log_probabilities():
    logits = table(0)
    answers = [(2, 3, EOS), (EOS,), (3, 3, 3, 2), ()]
    padded = np.array([list(one) + [0] * (T - len(one)) for one in answers], np.int32)
    rows = np.broadcast_to(padded, (B, *padded.shape))

    def score(step, cache, batch, length, eos_id, answers):
        return decoding.score(step, cache, answers)

    calls, got = calls_until_stop(score, logits, len(answers), answers=jnp.asarray(rows))
    for row in range(B):
        want = [log_probs(logits, row, one).sum() if one else -np.inf for one in answers]
        np.testing.assert_allclose(got[row], want, rtol=1e-5)
    assert calls == [0, 1, 2, 3]
    calls, _ = calls_until_stop(score, logits, 2, answers=jnp.asarray(rows[:, :2]))
    assert calls == [0, 1, 2]
