"""Mode `infer`: what is checked before a checkpoint is read."""

import pytest

from glimmer_jax.modes.infer import infer
from glimmer_jax.modes.settings import AnsweringConfig, CorpusConfig


def test_a_file_of_answers_is_not_replaced(tmp_path):
    (tmp_path / "predictions-dev.jsonl").write_text("{}\n")
    given = (AnsweringConfig("no checkpoint"), None, 1, CorpusConfig("p"), "q/dev.jsonl")
    facts = r"INFER_OUTPUT_DIR: .*predictions-dev\.jsonl exists.*OVERWRITE=True"
    with pytest.raises(ValueError, match=facts):
        infer(*given, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="CHECKPOINT_PATH"):
        infer(*given, output_dir=str(tmp_path), overwrite=True)
