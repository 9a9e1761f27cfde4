"""Mode `codebooks` at SIGTERM: exit code 42, and no incomplete file."""

import jax
import numpy as np
import pytest

from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.modes import stopping

SIZES = {
    "NUM_ENCODER_LAYERS": 2,
    "t5.T5Config.num_decoder_layers": 1,
    "t5.T5Config.emb_dim": 8,
    "t5.T5Config.num_heads": 2,
    "t5.T5Config.head_dim": 4,
    "t5.T5Config.mlp_dim": 16,
    "ALPHA": 0.5,
    "MAX_PASSAGE_TOKENS": 16,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A checkpoint and passages."""
    folder, vocabulary = tmp_path_factory.mktemp("work"), Vocabulary("pydocs")
    activations = ("relu", "linear")
    t5 = T5Config(2048, 8, 2, 4, 16, 2, 1, mlp_activations=activations, scan_layers=False)
    config = GlimmerConfig(t5, memory_layers=1, rerank_layers=1, num_kept=1)
    shapes, _ = GlimmerModel(config).abstract_variables()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype("f"), shapes)
    described = describe(config, vocabulary.fingerprint)
    save_params_file(str(folder / "tiny.safetensors"), params, described)
    records = [{"id": i, "title": f"page {i}", "text": "formatted stream " * 4} for i in range(60)]
    write_passages(
        folder / "passages",
        records,
        vocabulary.encode,
        vocabulary.fingerprint,
        16,
        vocab_size=vocabulary.vocab_size,
    )
    return folder


@pytest.mark.fault
@pytest.mark.parametrize("program", [stopping.ALONE, stopping.TWO], ids=["alone", "two"])
def test_interrupted_learning_exits_with_42_and_leaves_no_file(work, tmp_path, program):
    code, output = stopping.stopped(
        program,
        "Learning the codebooks of 1 subspaces",
        "codebooks",
        "sizes/tiny",
        "models/glimmer",
        "runs/codebooks",
        CHECKPOINT_PATH=str(work / "tiny.safetensors"),
        PASSAGES_DIR=str(work / "passages"),
        OUTPUT_PATH=str(tmp_path / "out" / "pq.safetensors"),
        MEMORY_CODEC="pq",
        ITERATIONS=10**6,
        **SIZES,
    )
    assert code == 42 and "glimmer: Stopped by SIGTERM" in output, output
    # The launcher writes a record of the job beside it.
    left = {path.name for path in (tmp_path / "out").glob("*") if "launch." not in path.name}
    assert not left
