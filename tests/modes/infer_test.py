"""Mode `infer`: what is checked before a checkpoint is read."""

import io

import pytest

from glimmer_jax.modes.infer import _typed, infer
from glimmer_jax.modes.settings import AnsweringConfig, CorpusConfig


def test_a_file_of_answers_is_not_replaced(tmp_path):
    (tmp_path / "predictions-dev.jsonl").write_text("{}\n")
    given = (AnsweringConfig("no checkpoint"), None, 1, CorpusConfig("p"), "q/dev.jsonl")
    facts = r"INFER_OUTPUT_DIR: .*predictions-dev\.jsonl exists.*OVERWRITE=True"
    with pytest.raises(ValueError, match=facts):
        infer(*given, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="CHECKPOINT_PATH"):
        infer(*given, output_dir=str(tmp_path), overwrite=True)


def test_typed_bytes_that_are_no_text_are_rejected(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(ValueError, match="The question is not valid utf-8"):
        next(_typed())
