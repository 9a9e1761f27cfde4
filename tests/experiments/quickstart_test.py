"""The quickstart's report, from files as the commands leave them."""

import json
import re

import pytest

from experiments import quickstart, report
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.storage.json_lines import write_json_lines


def example(task, number, gold_rank):
    page = f"mod.page{number}"
    return {
        "id": f"{task}/{number}",
        "input": "a clause",
        "output": [{"answer": page, "provenance": [{"wikipedia_id": page, "title": page}]}],
        "meta": {},
        "retrieved": [
            {
                "id": 10 * number + rank,
                "title": page if rank == gold_rank else "mod.other",
                "score": 3.0 - rank,
                "gold": rank == gold_rank,
            }
            for rank in range(2)
        ],
    }


@pytest.fixture
def found(tmp_path):
    """Six questions a task; BM25 is right on three, GLIMMER on five, FiD and LUMEN on four."""
    right = {"fid": 4, "lumen": 4, "glimmer": 5}
    for task in TASKS:
        examples = [example(task, i, gold_rank=int(i >= 3)) for i in range(6)]
        write_json_lines(tmp_path / f"{task}-test.jsonl", examples)
        for name, count in right.items():
            rows = []
            for i, one in enumerate(examples):
                ids = [passage["id"] for passage in one["retrieved"]]
                answer = one["output"][0]["answer"] if i < count else "mod.other"
                rows.append({"id": one["id"], "prediction": answer, "passage_ids": ids})
            folder = tmp_path / f"{name}_eval"
            folder.mkdir(exist_ok=True)
            write_json_lines(folder / f"predictions-pydocs_{task}.jsonl", rows)
            metrics = {"tflop_per_question": 0.1, "questions_per_second": 7.0}
            (folder / "metrics.json").write_text(json.dumps(metrics))
    records = {
        passage["id"]: {"title": passage["title"], "text": "page(a, b) Some words."}
        for one in examples
        for passage in one["retrieved"]
    }
    return quickstart.collect(tmp_path, tmp_path, records)


def test_the_report_has_what_it_promises(found):
    assert found["retriever"]["exact_match"] == pytest.approx(3 / 6)
    assert found["retriever"]["recall_at_1"] == pytest.approx(3 / 6)
    assert found["glimmer"]["exact_match"] == pytest.approx(5 / 6)
    assert found["fid"]["recall_at_1"] == pytest.approx(3 / 6)
    for name in report.MODELS:
        assert found[name]["tflop_per_question"] == 0.1
        assert found[name]["questions_per_second"] == 7.0
        slots = found[name]["tasks"]["slot_filling"]
        assert slots["n"] == 6
        assert slots["low"] <= slots["exact_match"] <= slots["high"]
        assert slots["low"] < slots["high"]
    difference = found["differences"]["glimmer - retriever, exact_match, which_function"]
    assert difference["difference"] == pytest.approx(2 / 6)
    assert difference["low"] <= 2 / 6 <= difference["high"]


def test_the_report_has_baselines_of_every_task(found):
    assert found["baselines"].keys() == set(TASKS)
    assert found["baselines"]["which_function"]["first_title"] == pytest.approx(3 / 6)
    for rules in found["baselines"].values():
        assert rules["recall_at_1"] == pytest.approx(3 / 6) and rules["recall_at_10"] == 1.0


def test_table_and_plot_show_every_system(found, tmp_path):
    text = report.table(found)
    assert "6 slot_filling" in text
    for name in ("retriever", *report.MODELS):
        (row,) = re.findall(rf"(?m)^ *{name} +[01].*$", text)
        results = found[name]["tasks"].values()
        assert [f"{result['exact_match']:.3f}" for result in results] == re.findall(
            r"([\d.]+) ±", row
        )
    for task, rules in found["baselines"].items():
        row = [row for row in text.splitlines() if row.split()[:1] == [task]][-1]
        assert all(f"{name} {value:.3f}" in row for name, value in rules.items())
    report.plot(found, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
