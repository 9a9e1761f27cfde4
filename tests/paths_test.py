import pathlib

import pytest

from glimmer_jax import paths
from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.passages import Passages, write_passages


def test_what_is_mapped_into_memory_is_local():
    assert paths.local("X", "data/x") == pathlib.Path("data/x")
    with pytest.raises(
        ValueError, match=r"VOCABULARY is read from .* a local disk, got gs://b/x.model"
    ):
        Vocabulary("gs://b/x.model")
    with pytest.raises(ValueError, match=r"PASSAGES_DIR is read from .* got gs://b/passages"):
        Passages.open("gs://b/passages")
    with pytest.raises(ValueError, match=r"PASSAGES_DIR is .*written to a local disk"):
        write_passages("gs://b/passages", [], str.split, "f", 9, vocab_size=9)
