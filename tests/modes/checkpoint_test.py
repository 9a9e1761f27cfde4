"""What modes take from a checkpoint: model, lengths and vocabulary, unless settings replace them."""

import dataclasses
import json

import pytest

from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.vocabulary import PYDOCS_MODEL, Vocabulary
from glimmer_jax.weights import huggingface
from glimmer_jax.weights.find_vocabulary import find_vocabulary
from glimmer_jax.weights.load import read_record
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny
from tests.vocabularies import SPECIAL_IDS, train_sentencepiece

BUILT_IN = Vocabulary("pydocs")
LENGTHS = {"inputs": 4, "targets": 3, "passages": (5, 6)}


def with_rows(config, rows=BUILT_IN.vocab_size):
    return dataclasses.replace(config, t5=dataclasses.replace(config.t5, vocab_size=rows))


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A SentencePiece model of 24 pieces: 124 ids, which fill 128 rows."""
    path = tmp_path_factory.mktemp("own") / "own.model"
    sentences = ["the quick brown fox jumps over the lazy dog"] * 5
    train_sentencepiece(path, sentences, model_type="char", vocab_size=24, **SPECIAL_IDS)
    assert 120 < Vocabulary(path).vocab_size <= 128
    return path


def public_t5(path, rows, vocabulary=None):
    """A T5 folder as others write it: no fingerprint, perhaps a spiece.model."""
    config = with_rows(tiny.FID, rows)
    huggingface.save(path, tiny.params(config), config, describe(config, "v"), vocabulary)
    settings = json.loads((path / "config.json").read_text())
    del settings["glimmer_jax"]
    (path / "config.json").write_text(json.dumps(settings))
    return str(path)


def own_checkpoint(path, config, vocabulary, copy=None):
    described = describe(config, Vocabulary(vocabulary).fingerprint, LENGTHS)
    save_params_file(path, tiny.params(config), described, copy)
    return str(path)


def test_a_t5_folder_without_its_vocabulary_requires_the_setting(tmp_path):
    path = public_t5(tmp_path / "t5", 128)
    facts = rf"VOCABULARY is required.*{path}.*no spiece\.model.*--gin\.VOCABULARY=.*Hugging Face"
    with pytest.raises(ValueError, match=facts):
        CheckpointConfig(path).read()


def test_a_t5_folder_gives_its_own_vocabulary(tmp_path, own_model):
    path = public_t5(tmp_path / "t5", 128, own_model.read_bytes())
    trained = CheckpointConfig(path).read()
    assert trained.vocabulary.fingerprint == Vocabulary(own_model).fingerprint
    # Its own file is right by definition, whatever the padding.
    path = public_t5(tmp_path / "padded", 1024, own_model.read_bytes())
    assert CheckpointConfig(path).read().model.config.t5.vocab_size == 1024


def test_another_vocabulary_of_the_same_size_is_rejected(tmp_path, own_model):
    path = public_t5(tmp_path / "t5", BUILT_IN.vocab_size, own_model.read_bytes())
    facts = f"VOCABULARY.*{BUILT_IN.fingerprint}.*{path}.*{Vocabulary(own_model).fingerprint}"
    with pytest.raises(ValueError, match=facts):
        CheckpointConfig(path, vocabulary="pydocs").read()


def test_a_vocabulary_must_fill_the_embedding_up_to_its_padding(tmp_path, own_model):
    path = public_t5(tmp_path / "t5", 32128)
    with pytest.raises(ValueError, match=r"VOCABULARY.*2048 ids.*32128.*spiece\.model"):
        CheckpointConfig(path, vocabulary="pydocs").read()
    path = public_t5(tmp_path / "fits", 128)
    CheckpointConfig(path, vocabulary=str(own_model)).read()
    path = public_t5(tmp_path / "too_large", 256)
    with pytest.raises(ValueError, match="ids, which fill 128 rows.*256"):
        CheckpointConfig(path, vocabulary=str(own_model)).read()


def test_own_checkpoints_find_their_vocabulary_and_reject_others(tmp_path, own_model):
    built_in = own_checkpoint(tmp_path / "a.safetensors", with_rows(tiny.FID), "pydocs")
    assert CheckpointConfig(built_in).read().vocabulary.path == PYDOCS_MODEL
    facts = f"VOCABULARY.*{Vocabulary(own_model).fingerprint}.*{built_in}.*{BUILT_IN.fingerprint}"
    with pytest.raises(ValueError, match=facts):
        CheckpointConfig(built_in, vocabulary=str(own_model)).read()

    config = with_rows(tiny.FID, 128)
    alone = own_checkpoint(tmp_path / "b.safetensors", config, own_model)
    with pytest.raises(ValueError, match="VOCABULARY is required.*trained with sha256"):
        CheckpointConfig(alone).read()
    own = own_checkpoint(tmp_path / "c.safetensors", config, own_model, own_model.read_bytes())
    assert CheckpointConfig(own).read().vocabulary.path == tmp_path / "c.spiece.model"


def test_settings_replace_what_the_checkpoint_records(tmp_path):
    config = with_rows(tiny.GLIMMER)
    path = own_checkpoint(tmp_path / "a.safetensors", config, "pydocs")
    trained = CheckpointConfig(path).read()
    undropped = dataclasses.replace(config.t5, dropout_rate=0.0)
    assert trained.model.config == dataclasses.replace(config, t5=undropped)
    assert trained.feature_lengths(None) == LENGTHS
    other = {"inputs": 8, "targets": 3, "passages": (5, 6)}
    assert trained.feature_lengths(other) == other

    changed = CheckpointConfig(path, num_kept=None, memory_codec="int8").read().model.config
    assert (changed.num_kept, changed.memory_codec) == (None, "int8")


def test_lengths_that_are_not_recorded_are_required(tmp_path, own_model):
    path = public_t5(tmp_path / "t5", 128, own_model.read_bytes())
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS is required.*--gin"):
        CheckpointConfig(path).read().feature_lengths(None)


def test_records_are_read_without_parameters(tmp_path):
    path = own_checkpoint(tmp_path / "a.safetensors", with_rows(tiny.GLIMMER), "pydocs")
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    assert read_record(path).config.num_kept == tiny.GLIMMER.num_kept


def test_there_is_no_default_vocabulary():
    with pytest.raises(ValueError, match="VOCABULARY is required.*'pydocs'"):
        find_vocabulary(None)
