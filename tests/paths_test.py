import pathlib

import pytest

from glimmer_jax import paths
from glimmer_jax.data.vocabulary import Vocabulary


def test_what_is_mapped_into_memory_is_local():
    assert paths.local("X", "data/x") == pathlib.Path("data/x")
    with pytest.raises(
        ValueError, match=r"VOCABULARY is read from .* a local disk, got gs://b/x.model"
    ):
        Vocabulary("gs://b/x.model")
