import pytest

from glimmer_jax.corpus.report import Policy


def test_policies_are_checked():
    with pytest.raises(ValueError, match="ON_ERROR must be one of"):
        Policy("ignore")
    with pytest.raises(ValueError, match="MAX_SKIPPED must be at least 0"):
        Policy(max_skipped=-1)
