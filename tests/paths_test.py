import pathlib

import pytest

from glimmer_jax import paths
from glimmer_jax.passages_writer import write_passages


def test_what_is_written_through_memory_maps_is_local():
    assert paths.local("X", "data/x") == pathlib.Path("data/x")
    with pytest.raises(ValueError, match=r"PASSAGES_DIR is written to a local disk, got gs://b/p"):
        write_passages("gs://b/passages", [], str.split, "f", 9, vocab_size=9)
