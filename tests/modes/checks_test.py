"""Checks of settings."""

import types

import pytest

from glimmer_jax.models.answers import DecodeConfig
from glimmer_jax.modes import checks
from glimmer_jax.modes.settings import AnsweringConfig, CorpusConfig
from glimmer_jax.retrieval.bm25 import Bm25Config

ANY_MODEL = types.SimpleNamespace(num_kept=None)


def test_lengths_that_nothing_reads_are_named():
    lengths = {"inputs": 8, "targets": 8, "passages": (2, 8), "outputs": 8}
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS has 'outputs', which nothing reads"):
        checks.lengths_for(ANY_MODEL, lengths)
    with pytest.raises(ValueError, match="positive integers"):
        checks.lengths_for(ANY_MODEL, {**lengths, "inputs": True})


def test_a_search_and_candidates_exclude_each_other():
    checks.one_answer_rule(("a", "b"), DecodeConfig())
    checks.one_answer_rule(None, DecodeConfig(beams=4))
    with pytest.raises(ValueError, match="leave out BEAM_SIZE and SAMPLING_TEMPERATURE"):
        checks.one_answer_rule(("a", "b"), DecodeConfig(beams=4))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_in_range(seed):
    with pytest.raises(ValueError, match="RANDOM_SEED must be from 0 to 4294967295, got"):
        AnsweringConfig("model", seed=seed)
    with pytest.raises(ValueError, match="RANDOM_SEED must be from 0 to 4294967295, got"):
        checks.seed(seed)


def test_values_that_only_a_memory_would_use_are_checked_without_one():
    with pytest.raises(ValueError, match="MEMORY_BYTES_PER_DEVICE must not be negative, got -1"):
        CorpusConfig(memory_bytes_per_device=-1)
    with pytest.raises(ValueError, match="UNKNOWN_PASSAGES must be 'error' or 'mask', got 'skip'"):
        CorpusConfig(unknown_passages="skip")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_settings_of_a_search_are_finite(value):
    with pytest.raises(ValueError, match="finite"):
        DecodeConfig(length_penalty=value)
    with pytest.raises(ValueError, match="finite"):
        DecodeConfig(temperature=value)
    with pytest.raises(ValueError, match="BM25_K1.*finite"):
        Bm25Config(k1=value)
