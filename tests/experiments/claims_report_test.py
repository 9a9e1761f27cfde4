"""Verdicts and the report, from results files with known answers."""

import json

import numpy as np
import pytest

from experiments import claim_report, claim_statistics
from experiments.claim_analysis import (
    FAILS,
    FEW_SEEDS,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    Study,
    adaptive,
    judge_all,
)
from experiments.claim_arms import ARMS, BLOCKS, RATES, THRESHOLDS, TUNING, Scale
from experiments.claim_report import Folders
from experiments.claim_results import Results, encode_numbers, pack
from glimmer_jax.pydocs.questions import TASKS

COUNT = 300  # questions of each task
ABOUT = {
    "stages": [
        {
            "name": "choose",
            "steps": 2,
            "settings": {
                "MIXTURE_OR_TASK_NAME": "pydocs_renamed",
                "TASK_FEATURE_LENGTHS": {"passages": [3, 120]},
                "LEARNING_RATE": 0.008,
            },
        }
    ]
}
# As the paper claims it.
QUALITY = {
    "fid": 0.5, "lumen": 0.5, "glimmer": 0.8, "tau_1": 0.6, "tau_0.3": 0.7, "tau_0.1": 0.8,
    "unranked": 0.5, "separate": 0.8, "lumen_trained": 0.7, "glimmer_frozen": 0.7,
    "lumen_small": 0.45, "glimmer_small": 0.75, "fid_single": 0.4, "lumen_single": 0.45,
    "glimmer_single": 0.75, "lumen_small_single": 0.25, "glimmer_small_single": 0.55,
    "bf16": 0.8, "pq": 0.85, "pq_fixed": 0.75,
}  # fmt: skip


def hits(quality, seed):
    """Answers with about this quality; the same questions are hard for all arms of a seed."""
    draw = np.random.default_rng(seed)
    return {task: draw.random(COUNT) < quality + 0.01 * draw.normal() for task in TASKS}


def cost(arm, key):
    _, retrieved, kept = key.split(":")
    per_passage = {"fid": 0.12, "lumen": 0.06}.get(arm, 0.03)
    extra = 0.1 if arm == "separate" else 0.0
    return per_passage * int(retrieved) + 0.03 * int(kept) * (arm not in ("fid", "lumen")) + extra


def quality_of(quality, arm, key):
    order, retrieved, kept = key.split(":")
    if arm in ("fid", "lumen"):
        return quality - 0.02 * (10 - min(int(retrieved), 10))
    if arm != "glimmer":
        return quality
    rises = 0.02 * min(int(retrieved), 10) + 0.06 * np.log(int(kept)) - 0.2
    return quality + rises + {"retriever": -0.2, "oracle": 0.1, "rule": -0.1}.get(order, 0)


def unit(block, arm, seed, quality):
    selections = Scale().selections(ARMS[arm], BLOCKS[block].selections)
    results = {}
    for selection in selections:
        key = selection.key
        results[key] = {"gflop": cost(arm, key)}
        if BLOCKS[block].speed:
            results[key] |= {"questions_per_second": 40 / cost(arm, key), "other_load": 0.0}
            continue
        found = hits(quality_of(quality[arm], arm, key), seed)
        results[key] |= {
            "hits": {task: pack(bits) for task, bits in found.items()},
            "exact_match": {task: float(bits.mean()) for task, bits in found.items()},
            "recall": dict.fromkeys(TASKS, 0.9),
        }
        if BLOCKS[block].nats:
            nats = np.random.default_rng(seed).integers(0, 500, COUNT) + {"pq_fixed": 40}.get(
                arm, 0
            )
            results[key]["nats"] = dict.fromkeys(TASKS, encode_numbers(nats))
            results[key]["mean_nats"] = dict.fromkeys(TASKS, float(nats.mean()) / 1000)
    for threshold in THRESHOLDS if block == "G" else ():
        results[f"mass:{threshold}"] = {**results["learned:10:2"], "gflop": 0.35 + 0.1 * threshold}
    return {
        "block": block, "arm": arm, "seed": seed, "rate": 1.0, "settings": f"of {arm}",
        "questions": "q", "procedure": "p", "seconds": {"train": 30, "evaluate": 6},
        "machine": "test", "results": results,
    }  # fmt: skip


def fill(path, blocks="ABCDEFGHS", seeds=5, quality=QUALITY):
    results = Results(path)
    pages = {task: encode_numbers(np.arange(COUNT) // 2) for task in TASKS}
    rules = {task: {"signature_rule": 0.9, "recall_at_1": 0.8} for task in TASKS}
    results.append({"questions": "q", "pages": pages, "baselines": rules})
    results.append({"procedure": "p", "about": ABOUT})
    for block in blocks:
        for seed in range(1 if BLOCKS[block].speed else seeds):
            for arm in BLOCKS[block].arms:
                results.append(unit(block, arm, seed, quality))
    return results


def verdicts(results):
    return {name: verdict for name, (verdict, _) in judge_all(Study(results)).items()}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(claim_statistics, "SAMPLES", 300)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("claims") / "claims.jsonl")


def test_all_claims_hold_where_the_answers_are_made_so(complete):
    assert set(verdicts(complete).values()) == {HOLDS}


def test_an_arm_with_another_rate_than_its_source_is_left_out(tmp_path):
    results = Results(tmp_path / "claims.jsonl")
    for record in fill(tmp_path / "all.jsonl", "AH", seeds=2).units:
        results.append({**record, "rate": 2.0 if record["arm"] == "pq" else 1.0})
    results.append({"questions": "q", "pages": {}, "baselines": {}})
    results.append({"procedure": "p", "about": ABOUT})
    study = Study(results)
    assert {arm for _, arm, _ in study.units} == {"fid", "lumen", "glimmer", "bf16", "pq_fixed"}
    assert study.stale == 2


def test_nats_are_compared_apart_from_matches(complete):
    _, (match, nats, _, fixed) = judge_all(Study(complete))["codes"]
    assert not match.nats and match.estimate.mean > 0.02
    assert nats.nats and nats.estimate.mean == pytest.approx(0, abs=1e-9)
    assert fixed.nats and fixed.estimate.mean == pytest.approx(-0.04)


def test_claims_fail_or_stay_undecided_where_the_answers_are_made_so(tmp_path):
    other = {**QUALITY, "glimmer": 0.3, "tau_1": 0.9, "separate": 0.9, "lumen_trained": 0.501}
    found = verdicts(fill(tmp_path / "claims.jsonl", quality=other))
    assert [found[name] for name in "1245"] == [FAILS] * 4
    coarse = {**QUALITY, "pq": 0.6}
    assert verdicts(fill(tmp_path / "coarse.jsonl", "H", quality=coarse))["codes"] == FAILS
    equal = {**QUALITY, "tau_0.1": QUALITY["tau_1"]}
    found = verdicts(fill(tmp_path / "equal.jsonl", "C", quality=equal))
    assert found["5"] in (FAILS, UNDECIDED)


def test_claims_without_results_or_seeds_are_named(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "AB", seeds=2)
    found = verdicts(results)
    assert found["5"] == found["2"] == found["4"] == NOT_RUN
    assert found["3"] == found["orders"] == FEW_SEEDS
    claim_report.write(results, Folders(tmp_path / "docs", tmp_path))
    page = (tmp_path / "docs" / "results.md").read_text()
    assert NOT_RUN in page and FEW_SEEDS in page
    with pytest.raises(ValueError, match=r"none\.jsonl.*experiments\.claims"):
        Study(Results(tmp_path / "none.jsonl"))


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "ACS", seeds=1)
    claim_report.write(results, Folders(tmp_path, tmp_path))
    summary = json.loads((tmp_path / "claims.json").read_text())
    (part, *_) = summary["claims"]["5"]["parts"]
    assert part["estimate"]["t"] is None and len(part["estimate"]["by_seed"]) == 1
    assert summary["claims"]["5"]["verdict"] == FEW_SEEDS


def with_quality(results, arm, key, quality):
    """Replaces the hits of an arm under a selection: a share of the questions, the same each seed."""
    for record in results.units:
        if record["arm"] == arm and record["block"] == "A":
            bits = np.arange(COUNT) < round(quality[record["seed"]] * COUNT)
            record["results"][key]["hits"] = {task: pack(bits) for task in TASKS}


def test_a_contradicted_part_decides_without_the_speed(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "A")
    verdict, (cheaper, faster) = judge_all(Study(results))["1"]
    assert (verdict, cheaper.verdict, faster.verdict) == (UNDECIDED, HOLDS, UNDECIDED)
    assert "speed not measured" in faster.text
    with_quality(results, "fid", "retriever:20:20", [1.0] * 5)
    verdict, (cheaper, faster) = judge_all(Study(results))["1"]
    assert (verdict, cheaper.verdict, faster.verdict) == (FAILS, HOLDS, FAILS)
    assert faster.estimate.high < -0.02


def test_a_rival_with_few_or_noisy_seeds_hides_no_other(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "AS")
    key = "retriever:1:1"
    # Its interval reaches lowest, and its mean is below GLIMMER's.
    with_quality(results, "lumen", key, [0.9, 0.1, 0.9, 0.1, 0.1])
    with_quality(results, "fid", key, [1.0] * 5)
    _, (cheaper, _) = judge_all(Study(results))["1"]
    assert cheaper.verdict == FAILS and "FiD, K = 1" in cheaper.text
    results = fill(tmp_path / "few.jsonl", "AS")
    for record in [r for r in results.units if r["arm"] == "lumen" and r["seed"] > 1]:
        record["results"].pop(key, None)
    verdict, (cheaper, _) = judge_all(Study(results))["1"]
    assert (verdict, cheaper.verdict) == (FEW_SEEDS, FEW_SEEDS)


def test_equal_compute_leaves_out_dearer_rivals(tmp_path):
    # FiD and LUMEN are best where they read twenty passages, at far more compute.
    results = fill(tmp_path / "claims.jsonl", "AS")
    for record in results.units:
        if record["arm"] in ("fid", "lumen") and record["block"] == "A":
            record["results"]["retriever:20:20"]["hits"] = {
                task: pack(np.ones(COUNT, bool)) for task in TASKS
            }
    verdict, (cheaper, faster) = judge_all(Study(results))["1"]
    assert (verdict, cheaper.verdict, faster.verdict) == (FAILS, HOLDS, FAILS)
    assert "K = 20" in faster.text and "K = 20" not in cheaper.text


def test_the_report_shows_every_claim_seed_and_baseline(complete, tmp_path):
    claim_report.write(complete, Folders(tmp_path / "docs", tmp_path))
    page = (tmp_path / "docs" / "results.md").read_text()
    study = Study(complete)
    for name, (verdict, parts) in judge_all(study).items():
        assert f"**{verdict}**" in page, name
        for part in parts:
            text = part.text if part.required else f"{part.text} (not part of the criterion)"
            (row,) = [row for row in page.splitlines() if f"| {text} |" in row]
            show = "{:+.3f}" if part.nats else "{:+.1f}"
            scale = 1 if part.nats else 100
            each = [show.format(scale * value) for value in part.estimate.by_seed]
            assert " ".join(each) in row and len(each) == 5
    for title in (
        "Block A",
        "Block B",
        "Block C",
        "Block D",
        "Block E",
        "Block F",
        "Block G",
        "Block H",
    ):
        assert title in page
    assert "signature rule | 90.0" in page
    seeds = [
        100 * x["exact_match"]["slot_filling"]
        for x in study.seeds("fid", "retriever:10:10").values()
    ]
    assert (
        f"| FiD | slot filling | {sum(seeds) / 5:.1f} | {' '.join(f'{x:.1f}' for x in seeds)} |"
        in page
    )
    assert "beside other work" not in page
    for line in page.split("\n| ")[0].splitlines():
        assert len(line) <= 100
    for name in ("claims_quality.png", "claims_passages.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG") and name in page
    summary = json.loads((tmp_path / "claims.json").read_text())
    assert summary["claims"]["1"]["verdict"] == HOLDS
    assert len(summary["units"]) == len(complete.units)
    assert summary["claims"]["5"]["hours"] == pytest.approx(4 * 5 * 36 / 3600, abs=0.01)


def test_speed_measured_beside_other_work_is_marked(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "AS", seeds=2)
    for record in results.units:
        for result in record["results"].values():
            if "other_load" in result:
                result["other_load"] = 1.5
    claim_report.write(results, Folders(tmp_path, tmp_path))
    assert "(beside other work)" in (tmp_path / "results.md").read_text()


def test_no_speed_is_compared_that_was_measured_beside_other_work(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "AS")
    assert verdicts(results)["1"] == HOLDS
    for load in (1.5, None):
        for record in results.units:
            if record["block"] == "S" and record["arm"] == "glimmer":
                for result in record["results"].values():
                    result["other_load"] = load
        verdict, (cheaper, faster) = judge_all(Study(results))["1"]
        assert (verdict, cheaper.verdict, faster.verdict) == (UNDECIDED, HOLDS, UNDECIDED)


def test_a_block_with_fewer_seeds_needs_no_more_of_them(tmp_path):
    assert BLOCKS["F"].seeds < BLOCKS["A"].seeds
    results = fill(tmp_path / "claims.jsonl", "AF", seeds=BLOCKS["F"].seeds)
    found = verdicts(results)
    assert found["2"] == HOLDS and found["3"] == FEW_SEEDS
    results = fill(tmp_path / "fewer.jsonl", "AF", seeds=BLOCKS["F"].seeds - 1)
    assert verdicts(results)["2"] == FEW_SEEDS


def test_tuning_is_shown_with_the_arms_that_use_it(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "AC", seeds=1)
    for rate, quality in zip(RATES, (0.4, 0.9, 0.5), strict=True):
        record = unit("A", "glimmer", 500, {**QUALITY, "glimmer": quality})
        for result in record["results"].values():
            result["exact_match"] = dict.fromkeys(TASKS, quality)
        results.append({**record, "block": TUNING, "rate": rate})
    claim_report.write(results, Folders(tmp_path, tmp_path))
    page = (tmp_path / "results.md").read_text()
    dev = "1: 40.0, 2: 90.0, 4: 50.0"
    assert f"| GLIMMER | 1 | {dev} |" in page
    assert f"| distillation, temperature 1 | 1 | {dev} (GLIMMER) |" in page
    assert "| LUMEN | 1 | not tuned |" in page


def test_adaptive_m_is_compared_at_equal_compute(complete):
    rows = adaptive(Study(complete))
    assert [row["threshold"] for row in rows] == sorted(THRESHOLDS)
    # The answers of m = 2 at a cost between those of m = 1 and 2, or of m = 2 and 3.
    assert all(0.36 <= row["gflop"] <= 0.45 for row in rows)
    for row in rows:
        assert (row["estimate"].mean > 0) == (row["gflop"] < cost("glimmer", "learned:10:2"))


def test_results_of_other_settings_are_left_out(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "C", seeds=3)
    results.append({**unit("C", "tau_1", 3, QUALITY), "settings": "new"})
    study = Study(results)
    assert set(study.seeds("tau_1", "learned:10:1")) == {3}
    assert set(study.seeds("tau_0.1", "learned:10:1")) == {0, 1, 2}
    assert study.stale == 3
    results.append({"procedure": "other", "about": ABOUT})
    results.append({**unit("C", "tau_1", 0, QUALITY), "procedure": "other"})
    assert len(Study(results).units) == 1


def test_a_repeated_measurement_of_speed_is_not_left_out(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "AS", seeds=1)
    results.append({**unit("S", "fid", 0, QUALITY), "seconds": {"train": 0, "evaluate": 1}})
    study = Study(results)
    assert study.stale == 0 and study.units["S", "fid", 0]["seconds"]["evaluate"] == 1


def test_results_survive_an_interruption_while_writing(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "C", seeds=1)
    with results.path.open("ab") as file:
        file.write(b'{"block": "C", "arm"')
    again = Results(results.path)
    assert again.units == results.units
    again.append(unit("C", "tau_1", 1, QUALITY))
    assert Results(results.path).units == again.units
    assert again.find(block="C", arm="tau_1", seed=1) is not None
    assert again.find(block="C", arm="tau_1", seed=2) is None


def test_lines_that_others_wrote_meanwhile_are_kept(tmp_path):
    results = fill(tmp_path / "claims.jsonl", "C", seeds=1)
    other = Results(results.path)
    results.append(unit("C", "tau_1", 1, QUALITY))
    other.append(unit("C", "tau_1", 2, QUALITY))
    again = Results(results.path)
    assert {record["seed"] for record in again.units if record["arm"] == "tau_1"} == {0, 1, 2}
    # A shorter file, such as that of another commit.
    results.path.write_bytes(b"".join(results.path.read_bytes().splitlines(keepends=True)[:3]))
    results.append(unit("C", "tau_1", 3, QUALITY))
    assert [record["seed"] for record in Results(results.path).units] == [0, 3]
