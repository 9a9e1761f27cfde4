"""Settings of a method that was not chosen are reported."""

import pytest

from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.retrieval.dense import DenseConfig
from tests.retrieval import tiny_gtr


@pytest.mark.parametrize(
    ("settings", "reported"),
    [({}, ()), ({"dense": DenseConfig("encoder", "index")}, ("ENCODER_DIR", "INDEX_DIR"))],
)
def test_settings_of_dense_retrieval_without_it_are_reported(tmp_path, caplog, settings, reported):
    passages = tiny_gtr.write_corpus(tmp_path / "passages")
    assert RetrieverConfig(**settings).open(passages).search(["one"], 1)
    for name in reported:
        assert name in caplog.text
    assert bool(reported) == bool(caplog.records)


def test_a_weight_without_two_retrievers_is_reported(tmp_path, caplog):
    passages = tiny_gtr.write_corpus(tmp_path / "passages")
    encoder = tiny_gtr.write(tmp_path / "gtr")
    dense = DenseConfig(str(encoder), str(tmp_path / "index"))
    RetrieverConfig("dense", dense=dense, dense_weight=0.3).open(passages)
    assert "DENSE_WEIGHT" in caplog.text
