"""Questions through a loaded model: batches, programs, candidates, samples."""

import dataclasses

import jax
import numpy as np
import pytest

from glimmer_jax.axes import Lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.retrieval.dense import DenseConfig
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.serving.step import Predict
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny
from tests.retrieval import tiny_gtr

WORDS = ("red", "green", "blue")
QUESTIONS = [{"id": word, "input": f"{word} thing"} for word in WORDS]
LENGTHS = Lengths(question=8, target=4, passages=2, passage=8)
VOCABULARY = Vocabulary("pydocs")
T5 = dataclasses.replace(tiny.T5, vocab_size=VOCABULARY.vocab_size, num_encoder_layers=1)
GLIMMER = GlimmerConfig(T5, rerank_layers=1, num_kept=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "passages"
    records = [{"id": i, "title": word, "text": f"{word} thing"} for i, word in enumerate(WORDS)]
    encode, fingerprint = VOCABULARY.encode, VOCABULARY.fingerprint
    write_passages(folder, records, encode, fingerprint, 16, vocab_size=T5.vocab_size)
    return folder


@pytest.fixture(scope="module")
def made(corpus):
    """(predictor for batches of 1 and 2, shapes of the batches that its program was traced for)."""
    model = GlimmerModel(GLIMMER)
    traced, read = [], model.read_batch

    def noted(params, batch):
        traced.append(batch["question_tokens"].shape[0])
        return read(params, batch)

    model.read_batch = noted
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    passages = Passages.open(corpus)
    args = (
        model,
        tiny.params(GLIMMER),
        mesh,
        LENGTHS,
        VOCABULARY,
        passages,
        None,
        RetrieverConfig(),
    )
    return Predictor(*args, batch_sizes=(2, 1), seed=0), traced


def test_string_ids_come_back_as_they_were(tmp_path):
    records = [{"id": f"doc-{w}", "title": w, "text": f"{w} thing"} for w in WORDS]
    encode, fingerprint = VOCABULARY.encode, VOCABULARY.fingerprint
    write_passages(tmp_path / "p", records, encode, fingerprint, 16, vocab_size=T5.vocab_size)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model, passages = GlimmerModel(GLIMMER), Passages.open(tmp_path / "p")
    args = (
        model,
        tiny.params(GLIMMER),
        mesh,
        LENGTHS,
        VOCABULARY,
        passages,
        None,
        RetrieverConfig(),
    )
    predictor = Predictor(*args, batch_sizes=(1,), seed=0)
    given = {"id": "q", "input": "x", "retrieved": [{"id": "doc-green"}, {"id": "doc-blue"}]}
    for question in (given, QUESTIONS[0]):
        (record,) = predictor.answer([question])
        ids = [passage["id"] for passage in record["passages"]]
        assert set(ids) <= {f"doc-{word}" for word in WORDS} and len(ids) > 0
        named = [place["wikipedia_id"] for place in record["output"][0]["provenance"]]
        assert named == ids
        if question is given:
            assert set(ids) == {"doc-green", "doc-blue"}


def test_a_warm_predictor_does_not_compile_and_answers_ignore_batches(made):
    predictor, traced = made
    predictor.warm_up()
    assert sorted(traced) == [1, 2]
    together = predictor.answer(QUESTIONS)  # a batch of two, then one of one
    assert [one["id"] for one in together] == list(WORDS)
    for question, record in zip(QUESTIONS, together, strict=True):
        (alone,) = predictor.answer([question])
        assert alone["output"] == record["output"]
        assert alone["score"] == pytest.approx(record["score"], abs=1e-3)
    assert sorted(traced) == [1, 2]
    assert predictor.answer([]) == []


def test_candidates_are_the_only_answers(made):
    predictor, _ = made
    for record in predictor.answer(QUESTIONS[:2], candidates=["yes", "no", "or"]):
        ranked = record["candidates"]
        assert {one["answer"] for one in ranked} == {"yes", "no", "or"}
        scores = [one["score"] for one in ranked]
        assert scores == sorted(scores, reverse=True) and record["score"] == scores[0]
        assert record["output"][0]["answer"] == ranked[0]["answer"]
    with pytest.raises(ValueError, match="CANDIDATES is an empty list"):
        predictor.answer(QUESTIONS[:1], candidates=[])


@pytest.mark.parametrize(
    ("question", "facts"),
    [
        ({"input": "x"}, "Question 0 .*'id'.*None"),
        ({"id": "a"}, "Question 0 .*'input'.*None"),
        ({"id": "a", "input": None}, "Question 0 .*'input'.*None"),
        ({"id": "a", "input": "\ud800"}, "Question 0 .*'a'.*surrogate.*position 0.*UTF-8"),
        ({"id": "a", "input": "x", "retrieved": None}, "'a'.*retrieved.*None.*BM25"),
        ({"id": "a", "input": "x", "retrieved": [{"id": 7.5}]}, "'a'.*retrieved.*7.5"),
        ("x", "Question 0 must be a dict.*'x'"),
    ],
)
def test_malformed_questions_are_rejected_by_place_and_field(made, question, facts):
    predictor, _ = made
    with pytest.raises(ValueError, match=facts):
        predictor.answer([question])


def test_questions_that_are_cut_are_counted(made):
    predictor, _ = made
    before = predictor.truncated
    predictor.answer([{"id": "a", "input": "red green blue " * 8}])
    assert predictor.truncated == before + 1


def test_draws_differ_from_batch_to_batch_and_repeat_with_the_seed():
    model = GlimmerModel(tiny.FID, decode=DecodeConfig(temperature=3.0))
    params, batch = tiny.params(tiny.FID), tiny.batch(gold=False)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    one, again = Predict(model, mesh, seed=4), Predict(model, mesh, seed=4)
    first, second = one(params, batch)[0], one(params, batch)[0]
    assert (first != second).any()
    np.testing.assert_array_equal(again(params, batch)[0], first)


@pytest.mark.parametrize("batch_sizes", [(), (8, 12), (0,)])
def test_batches_that_do_not_divide_over_the_devices_are_rejected(tmp_path, batch_sizes):
    with pytest.raises(ValueError, match="multiples of 8"):
        Predictor.load(tmp_path, LENGTHS, passages_dir=tmp_path, batch_sizes=batch_sizes)


def test_load_uses_the_model_that_the_checkpoint_records(corpus, tmp_path):
    checkpoint = tmp_path / "glimmer.safetensors"
    described = describe(GLIMMER, VOCABULARY.fingerprint)
    save_params_file(checkpoint, tiny.params(GLIMMER), described)
    reads_all = GlimmerModel(dataclasses.replace(GLIMMER, num_kept=None))
    given = (None, GlimmerModel(GLIMMER), reads_all)
    own, same, both = (
        Predictor.load(checkpoint, LENGTHS, model=model, passages_dir=corpus).answer(QUESTIONS)
        for model in given
    )
    assert own == same
    assert [[one["kept"] for one in record["passages"]] for record in own] == [[True, False]] * 3
    assert [[one["kept"] for one in record["passages"]] for record in both] == [[True, True]] * 3


def test_load_finds_the_vocabulary_or_names_the_setting(corpus, tmp_path):
    params = tiny.params(GLIMMER)
    recorded, unknown = tmp_path / "recorded.safetensors", tmp_path / "unknown.safetensors"
    save_params_file(recorded, params, describe(GLIMMER, VOCABULARY.fingerprint))
    described = describe(GLIMMER, VOCABULARY.fingerprint)
    del described["vocabulary_fingerprint"]
    save_params_file(unknown, params, described)
    with pytest.raises(ValueError, match="VOCABULARY is required.*unknown.safetensors"):
        Predictor.load(unknown, LENGTHS, passages_dir=corpus)
    found = Predictor.load(recorded, LENGTHS, passages_dir=corpus)
    given = Predictor.load(unknown, LENGTHS, passages_dir=corpus, vocabulary=VOCABULARY)
    assert found.answer(QUESTIONS) == given.answer(QUESTIONS)


@pytest.mark.parametrize("method", ["dense", "hybrid"])
def test_questions_find_passages_by_vectors(corpus, tmp_path, method):
    encoder = str(tiny_gtr.write(tmp_path / "gtr", words_alone=True))
    dense = DenseConfig(encoder, str(tmp_path / "index"))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    args = (GlimmerModel(GLIMMER), tiny.params(GLIMMER), mesh, LENGTHS, VOCABULARY)
    config = RetrieverConfig(method, dense=dense)
    predictor = Predictor(*args, Passages.open(corpus), None, config, batch_sizes=(2,), seed=0)
    given = {"id": "given", "input": "red", "retrieved": [{"id": 2}]}
    asked = [QUESTIONS[1], given, QUESTIONS[0]]
    ids = predictor.retrieve(asked)
    assert [row[0] for row in ids] == [1, 2, 0] and [len(row) for row in ids] == [2, 1, 2]
    assert [len(record["passages"]) for record in predictor.answer(asked)] == [2, 1, 2]


def test_a_checkpoint_without_a_recorded_model_is_reported(corpus, tmp_path):
    checkpoint = tmp_path / "some.safetensors"
    save_params_file(checkpoint, tiny.params(GLIMMER), {})
    with pytest.raises(ValueError, match=r"some.safetensors, .*model"):
        Predictor.load(checkpoint, LENGTHS, passages_dir=corpus)
