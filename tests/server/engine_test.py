"""Answers of the engine equal those of a `Predictor`, whatever shares their batch."""

import copy
import shutil

import jax
import pytest

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.server.engine import PredictorEngine
from glimmer_jax.server.protocol import Question, RequestError
from glimmer_jax.serving.predictor import Predictor
from tests.models import tiny
from tests.serving.predictor_test import (
    GLIMMER,
    LENGTHS,
    VOCABULARY,
    WORDS,
    corpus,  # noqa: F401 - a fixture
)


@pytest.fixture(scope="module")
def predictor(corpus):  # noqa: F811
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model, params = GlimmerModel(GLIMMER), tiny.params(GLIMMER)
    args = (
        model,
        params,
        mesh,
        LENGTHS,
        VOCABULARY,
        Passages.open(corpus),
        None,
        RetrieverConfig(),
    )
    return Predictor(*args, batch_sizes=(1, 4), seed=0)


@pytest.fixture(scope="module")
def engine(predictor):
    engine = PredictorEngine(predictor, kept=(1, 2))
    engine.warm_up()
    return engine


def question(word, **settings):
    return Question(word, f"{word} thing", **settings)


def answers(engine, *questions):
    assert len({engine.key(q) for q in questions}) == 1
    return engine.compute(engine.prepare(questions))


def test_answers_equal_those_of_a_predictor(engine, predictor):
    expected = predictor.answer([{"id": w, "input": f"{w} thing"} for w in WORDS])
    for found, record in zip(answers(engine, *map(question, WORDS)), expected, strict=True):
        (alone,) = answers(engine, question(found["id"]))
        for answer in (found, alone):
            assert answer["answer"] == record["output"][0]["answer"]
            assert answer["log_likelihood"] == pytest.approx(record["score"], abs=1e-3)
            assert [p["id"] for p in answer["passages"]] == [p["id"] for p in record["passages"]]
        assert set(found["timings"]) == {"retrieval", "memory", "read", "decode"}
        assert all(seconds >= 0 for seconds in found["timings"].values())
        assert found["passages"][0]["text"].endswith("thing")


def test_candidates_of_different_questions_share_a_batch(engine, predictor):
    asked = (question("red", candidates=("yes", "no")), question("blue", candidates=("or", "if")))
    for found, one in zip(answers(engine, *asked), asked, strict=True):
        example = {"id": one.id, "input": one.input}
        (expected,) = predictor.answer([example], candidates=one.candidates)
        assert found["answer"] == expected["output"][0]["answer"]
        assert [c["answer"] for c in found["candidates"]] == [
            c["answer"] for c in expected["candidates"]
        ]


def test_the_number_of_kept_passages_is_that_of_the_request(engine):
    for kept in (1, 2):
        (found,) = answers(engine, question("red", num_kept=kept))
        assert sum(passage["kept"] for passage in found["passages"]) == kept
    (found,) = answers(engine, question("red"))
    assert sum(passage["kept"] for passage in found["passages"]) == 1


def test_without_reranking_the_retrievers_first_passages_are_read(engine):
    (found,) = answers(engine, question("red", rerank=False))
    assert [(p["rank"], p["kept"]) for p in found["passages"]] == [(0, True)]


def test_given_passages_are_read_in_place_of_retrieved_ones(engine):
    (found,) = answers(engine, question("red", retrieved=(2,)))
    assert [passage["title"] for passage in found["passages"]] == ["blue"]


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"retrieved": (99,)}, "99"),
        ({"candidates": ("far too long a candidate for these lengths",)}, "tokens"),
        ({"candidates": ("a", "a")}, "tokens"),
    ],
)
def test_requests_that_cannot_be_answered_are_rejected(engine, settings, fact):
    with pytest.raises(RequestError, match=fact) as caught:
        engine.check(question("red", **settings))
    assert caught.value.status == 422


def test_limits_follow_the_model(engine, predictor):
    limits = engine.limits(questions=3)
    assert (limits.passages, limits.kept, limits.questions) == (2, (1, 2), 3)
    assert limits.candidates == 2
    assert PredictorEngine(predictor, max_candidates=0).limits().candidates == 0
    with pytest.raises(ValueError, match=r"num_kept=3.*2"):
        predictor.keeping(3)


def test_a_reload_without_a_change_keeps_the_version(engine):
    before = engine.describe()
    assert engine.reload() is False and engine.describe() == before


def test_a_reload_serves_new_passages_and_compiles_nothing(
    predictor,
    corpus,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    folder, opened = shutil.copytree(corpus, tmp_path / "passages"), []
    open_retriever = RetrieverConfig.open

    def counted(config, passages):
        opened.append(passages)
        return open_retriever(config, passages)

    monkeypatch.setattr(RetrieverConfig, "open", counted)
    served = PredictorEngine(_over(predictor, folder), kept=(1, 2), max_candidates=0)
    served.warm_up()
    assert answers(served, question("red", num_kept=2)) and len(opened) == 1
    assert served.reload() is False and len(opened) == 1

    records = [
        {"id": i, "title": f"new {word}", "text": f"{word} thing"} for i, word in enumerate(WORDS)
    ]
    encode, fingerprint = VOCABULARY.encode, VOCABULARY.fingerprint
    write_passages(folder, records, encode, fingerprint, 16, vocab_size=2048, overwrite=True)
    assert served.reload() is True
    with jax.log_compiles():
        for kept in (1, 2):
            (found,) = answers(served, question("red", num_kept=kept))
            assert all(p["title"].startswith("new ") for p in found["passages"])
            assert sum(passage["kept"] for passage in found["passages"]) == kept
    assert len(opened) == 2 and "ompil" not in caplog.text
    # The same tokens: only the text behind the last of them differs.
    for ending in ("one", "two"):
        records = [{"id": 0, "title": "red", "text": f"{'red ' * 40} {ending}"}]
        write_passages(folder, records, encode, fingerprint, 16, vocab_size=2048, overwrite=True)
        before = served.describe()
        assert served.reload() is True and served.describe() != before
        assert answers(served, question("red"))[0]["passages"][0]["text"].endswith(ending)


def _over(predictor, folder):
    """Another predictor of the same model over a folder of passages."""
    other = copy.copy(predictor)
    other.passages, other._retriever = Passages.open(folder), None
    return other
