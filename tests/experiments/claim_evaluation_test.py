"""Evaluation of an arm: sets of passages are answered as the complete model answers them."""

import json

import numpy as np
import pytest

from experiments import claim_evaluation
from experiments.claim_arms import DEPTH, THRESHOLDS, Selection
from experiments.claim_evaluation import Job, TrainedModel, sizes
from experiments.claim_results import (
    NATS_UNIT,
    Results,
    decode_numbers,
    encode_numbers,
    pack,
    unpack,
)
from glimmer_jax import shipped
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.kilt.examples import answers
from glimmer_jax.metrics import qa
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.storage.json_lines import write_json_lines
from glimmer_jax.vocabulary import Vocabulary

VERBS = (
    "open", "close", "read", "write", "find", "split", "join", "sort", "copy", "move", "seek", "send",
)  # fmt: skip
GLIMMER = str(shipped.CHECKPOINTS / "pydocs_glimmer.safetensors")
FID = str(shipped.CHECKPOINTS / "pydocs_fid.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus of a page per verb; the gold passage of question i is retrieved at rank i."""
    folder = tmp_path_factory.mktemp("data")
    vocabulary = Vocabulary("pydocs")
    records = [
        {"id": i, "title": f"tool.{verb}", "text": f"{verb}(path) Return how to {verb} a file."}
        for i, verb in enumerate(VERBS)
    ]
    write_passages(
        folder / "passages",
        records,
        vocabulary.encode,
        vocabulary.fingerprint,
        120,
        vocab_size=vocabulary.vocab_size,
        source="test",
    )
    for task in TASKS:
        for split in ("dev", "test"):
            lines = [
                {
                    "id": f"{task}/{i}",
                    "input": f"Return how to {verb} a file",
                    "output": [
                        {
                            "answer": f"tool.{verb}",
                            "provenance": [{"wikipedia_id": f"tool.{verb}", "title": verb}],
                        }
                    ],
                    "meta": {},
                    "retrieved": [
                        {"id": j, "score": -float(j), "gold": i == j} for j in range(len(VERBS))
                    ],
                }
                for i, verb in enumerate(VERBS[:5])
            ]
            write_json_lines(folder / f"{task}-{split}.jsonl", lines)
    return folder


def job(data, tmp_path, path, selections, **settings):
    return Job(
        runs=dict.fromkeys(TASKS, path),
        reranks=path == GLIMMER,
        selections=[list(selection) for selection in selections],
        questions=str(data),
        passages=str(data / "passages"),
        scratch=str(tmp_path / "memory"),
        **settings,
    )


def test_answers_of_sets_are_those_of_the_complete_model(data, tmp_path):
    passages = Passages.open(data / "passages")
    model = TrainedModel(GLIMMER, True, passages, tmp_path)
    lines = claim_evaluation.read_questions(job(data, tmp_path, GLIMMER, []))["which_function"]
    selections = [Selection("learned", k, m) for k, m in ((4, 1), (10, 1), (10, 3), (3, 3))]
    found = claim_evaluation.run(job(data, tmp_path, GLIMMER, selections))["results"]
    for selection in selections:
        predictor = model.predictor(model.config(selection), selection.retrieved)
        answered = predictor.answer(lines)
        texts = [answer["output"][0]["answer"] for answer in answered]
        expected = [
            bool(qa.match_of(answers(line), x)) for line, x in zip(lines, texts, strict=True)
        ]
        result = found[selection.key]
        assert unpack(result["hits"]["which_function"], len(lines)).tolist() == expected
        kept = [{x["id"] for x in answer["passages"] if x["kept"]} for answer in answered]
        recall = np.mean([i in ids for i, ids in enumerate(kept)])
        assert result["recall"]["which_function"] == pytest.approx(recall)
        assert result["gflop"] > 0
    assert not (tmp_path / "memory").exists()


def test_nats_are_those_of_the_right_answer_per_token(data, tmp_path):
    selections = [Selection("retriever", 3, 1), Selection("retriever", 3, 3)]
    found = claim_evaluation.run(job(data, tmp_path, GLIMMER, selections, nats=True))["results"]
    model = TrainedModel(GLIMMER, True, Passages.open(data / "passages"), None)
    lines = claim_evaluation.read_questions(job(data, tmp_path, GLIMMER, []))["slot_filling"]
    for selection in selections:
        measured = decode_numbers(found[selection.key]["nats"]["slot_filling"]) * NATS_UNIT
        mean = found[selection.key]["mean_nats"]["slot_filling"]
        assert measured.mean() == pytest.approx(mean, abs=1e-3)
        predictor = model.predictor(model.reader, selection.kept)
        for line, nats in zip(lines, measured, strict=True):
            right = answers(line)[:1]
            read = {**line, "retrieved": line["retrieved"][: selection.kept]}
            ((candidate,),) = (one["candidates"] for one in predictor.answer([read], right))
            count = (predictor.encode_candidates(right) > 0).sum()
            assert nats == pytest.approx(-candidate["score"] / count, abs=0.02)


def test_orders_have_the_recall_of_their_names(data, tmp_path):
    read = [Selection(order, DEPTH, 1) for order in ("retriever", "oracle", "rule")]
    counted = [Selection("oracle", 3, 1), Selection("retriever", 3, 2)]
    found = claim_evaluation.run(
        job(data, tmp_path, GLIMMER, read, recalls=[list(x) for x in counted])
    )["results"]
    recall = {key: result["recall"]["slot_filling"] for key, result in found.items()}
    assert recall == {
        "retriever:30:1": 0.2, "oracle:30:1": 1.0, "rule:30:1": 1.0,
        # Three of five gold passages are among the first three, two among the first two.
        "oracle:3:1": 0.6, "retriever:3:2": 0.4,
    }  # fmt: skip
    assert "hits" not in found["oracle:3:1"]


def test_fid_reads_all_retrieved_passages_at_a_cost_that_grows(data, tmp_path):
    selections = [Selection("retriever", k, k) for k in (1, 10)]
    found = claim_evaluation.run(job(data, tmp_path, FID, selections, num_examples=4))["results"]
    one, ten = (found[selection.key] for selection in selections)
    assert 5 < ten["gflop"] / one["gflop"] < 10
    assert one["recall"]["which_function"] == 0.25 and ten["recall"]["which_function"] == 1.0
    assert len(unpack(ten["hits"]["which_function"], 4)) == 4


def test_adaptive_m_grows_with_the_share_of_the_scores(data, tmp_path):
    selections = [Selection("learned", 10, m) for m in (1, 2, 3)]
    found = claim_evaluation.run(job(data, tmp_path, GLIMMER, selections, adaptive=True))["results"]
    costs = [found[f"mass:{threshold}"]["gflop"] for threshold in THRESHOLDS]
    assert costs == sorted(costs)
    assert found["learned:10:1"]["gflop"] <= costs[0] <= costs[-1] <= found["learned:10:3"]["gflop"]


def test_no_more_passages_are_scored_than_selections_ask_for(data, tmp_path, monkeypatch):
    depths = []

    def scores(model, lines, depth):
        depths.append(depth)
        return np.zeros((len(lines), depth), np.float32)

    monkeypatch.setattr(TrainedModel, "scores", scores)
    monkeypatch.setattr(
        TrainedModel, "hits", lambda model, lines, sets: dict.fromkeys(sets[1], True)
    )
    one, few = [Selection("learned", 10, 1)], [list(Selection("learned", 5, 2))]
    for recalls in ([], few, [list(Selection("learned", DEPTH, 1))]):
        claim_evaluation.run(job(data, tmp_path, GLIMMER, one, recalls=recalls, num_examples=1))
    claim_evaluation.run(job(data, tmp_path, GLIMMER, [Selection("rule", 10, 1)], num_examples=1))
    assert depths == [10, 10, DEPTH]


def test_m_is_the_smallest_that_reaches_the_share():
    selections = [Selection("learned", 4, m) for m in (1, 2, 3)]
    scores = np.log(np.array([[0.7, 0.1, 0.1, 0.1, 99], [0.3, 0.4, 0.2, 0.1, 99]]))
    choose = claim_evaluation._choose
    assert [x.kept for x in choose(selections, scores, 0.69)] == [1, 2]
    assert [x.kept for x in choose(selections, scores, 0.75)] == [2, 3]
    assert [x.kept for x in choose(selections, scores, 0.99)] == [3, 3]


def test_speed_is_measured_for_every_selection(data, tmp_path):
    selections = [Selection("learned", 10, 1), Selection("learned", 10, 3)]
    found = claim_evaluation.run(job(data, tmp_path, GLIMMER, selections, speed_questions=6))
    for result in found["results"].values():
        assert result["questions_per_second"] > 0 and result["gflop"] > 0
        assert result["other_load"] is None or result["other_load"] >= 0
        assert "hits" not in result


def test_questions_are_recorded_once_with_pages_and_baselines(data, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    first = results.add_questions(data, data / "passages", None)
    again = Results(tmp_path / "results.jsonl")
    assert again.add_questions(data, data / "passages", None) == first
    (record,) = again.questions.values()
    pages = decode_numbers(record["pages"]["which_function"])
    assert len(set(pages.tolist())) == 5
    assert record["baselines"]["which_function"]["recall_at_1"] == pytest.approx(0.2)
    # Rules read ten passages.
    assert record["baselines"]["which_function"]["word_match"] == 1.0
    assert again.add_questions(data, data / "passages", 3) != first
    assert json.loads(results.path.read_text().splitlines()[0])["questions"] == first


def test_packed_values_are_unpacked():
    bits = np.random.default_rng(0).random(13) < 0.5
    assert unpack(pack(bits), 13).tolist() == bits.tolist()
    assert decode_numbers(encode_numbers([0, 65535, 7])).tolist() == [0, 65535, 7]
    assert sizes(7).passages == 7
