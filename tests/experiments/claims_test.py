"""The runner of the experiments: pairing, shared runs and resumption, with training left out."""

import json
from pathlib import Path

import gin
import pytest

from experiments import claim_arms, claims, train_pydocs
from experiments.claim_arms import (
    ARMS,
    BLOCKS,
    RATES,
    STAGES,
    THRESHOLDS,
    TUNED,
    Scale,
    task_steps,
)
from experiments.claim_criteria import CLAIMS, Rivals
from experiments.claim_results import Results, pack
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.storage.lease import WriterLock
from tests.experiments.train_pydocs_test import Commands, configured

COUNT = 4


class Study(Commands):
    """Stands in for all commands of the study; a model answers all questions of an arm alike."""

    def __init__(self):
        super().__init__()
        self.jobs = []
        self.quality = lambda job: 0.5

    def run_module(self, module, job_path, result_path, devices=None):
        assert module == "experiments.claim_evaluation"
        job = json.loads(Path(job_path).read_text())
        self.jobs.append(job)
        keys = [":".join(map(str, fields)) for fields in job["selections"]]
        if job["adaptive"]:
            keys += [f"mass:{threshold}" for threshold in THRESHOLDS]
        quality = self.quality(job)
        values = {
            "gflop": 1.0,
            "hits": dict.fromkeys(TASKS, pack([True] * COUNT)),
            "exact_match": dict.fromkeys(TASKS, quality),
            "recall": dict.fromkeys(TASKS, 0.5),
        }
        Path(result_path).write_text(json.dumps({"results": dict.fromkeys(keys, values)}))


@pytest.fixture
def study(monkeypatch, tmp_path):
    found = Study()
    monkeypatch.setattr(claims, "glimmer", found)
    monkeypatch.setattr(claims, "run_module", found.run_module)
    monkeypatch.setattr(claims, "write_data", lambda: None)
    monkeypatch.setattr(claims.claim_report, "write", lambda *args: None)
    monkeypatch.setattr(Results, "add_questions", lambda *args: "questions")
    monkeypatch.chdir(tmp_path)
    Path("start.safetensors").write_bytes(b"parameters")
    Path(claims.QUESTIONS).mkdir(parents=True)
    for name in (f"{task}-{split}.jsonl" for task in TASKS for split in claims.SPLITS):
        Path(claims.QUESTIONS, name).touch()
    yield found
    gin.clear_config()


def run(*flags):
    claims.main(["--start=start.safetensors", "--output=runs", *flags])
    return Results(Path("experiments/claims.jsonl")).units


def trainings(study):
    return [macros for mode, _, macros in study.ran if mode == "train"]


def test_every_block_runs_its_arms_once_per_seed(study):
    units = run("--seeds=0,1")
    # Speed is measured when asked for, on an idle machine.
    assert {unit["block"] for unit in units} == BLOCKS.keys() - {"S"}
    units = run("--seeds=0,1", "--blocks=S")
    expected = {
        (block, arm, seed)
        for block, about in BLOCKS.items()
        for arm in about.arms
        for seed in ((0,) if about.speed else (0, 1))
    }
    assert [unit for unit in expected if unit not in ids(units)] == []
    assert len(units) == len(expected)
    assert {unit["rate"] for unit in units} == {1.0}


def test_a_block_runs_as_many_seeds_as_its_verdict_needs(study):
    units = run("--blocks=D,F,S")
    seeds = {block: {unit["seed"] for unit in units if unit["block"] == block} for block in "DFS"}
    assert seeds == {"D": {0, 1, 2, 3, 4}, "F": {0, 1, 2}, "S": {0}}


def ids(units):
    return {(unit["block"], unit["arm"], unit["seed"]) for unit in units}


def test_arms_of_a_seed_read_the_same_examples_and_seeds_differ(study):
    run("--blocks=A,C,D,E,H", "--seeds=0,1")
    streams = {}
    for macros in trainings(study):
        stage = macros["MODEL_DIR"].name.partition("_")[0]
        streams.setdefault(stage, set()).add(macros["RANDOM_SEED"])
    assert streams.keys() == {stage.name for stage in STAGES}
    assert all(len(seeds) == 2 for seeds in streams.values())
    assert len(set.union(*streams.values())) == 6
    # Not the streams of the shipped models of any plausible seed.
    assert min(set.union(*streams.values())) >= 100 * train_pydocs.SEEDS_PER_RUN


def test_arms_that_differ_later_share_their_first_runs(study):
    run("--blocks=A,B,D,G,H", "--seeds=0")
    names = study.runs()
    assert len(names) == len(set(names))
    # FiD, LUMEN, GLIMMER and its separate reranker; block H trains on from GLIMMER's first run.
    assert sum(name.startswith("choose") for name in names) == 4
    assert sum(name.startswith("adapt") for name in names) == 3
    assert sum(name.startswith("ten") for name in names) == 4 + 3


def test_codebooks_are_learned_from_the_encoder_before_memory_is_stored_as_codes(study):
    run("--blocks=H", "--seeds=0")
    learned, *again = [macros for mode, _, macros in study.ran if mode == "codebooks"]
    assert again in ([], [learned])  # no files here
    runs = {}
    for macros in trainings(study):
        runs.setdefault(macros["MODEL_DIR"].name.partition("_")[0], []).append(macros)
    (first,) = runs["choose"]
    assert learned["CHECKPOINT_PATH"] == first["MODEL_DIR"] and "MEMORY_CODEC" not in first
    for stage in ("adapt", "ten"):
        ways = [(m.get("MEMORY_CODEC"), m.get("TRAIN_CODEBOOKS")) for m in runs[stage]]
        assert ways == [(None, None), ("pq", True), ("pq", None)]
    starts = [macros["INITIAL_CHECKPOINT_PATH"] for macros in runs["adapt"]]
    assert starts == [first["MODEL_DIR"], *[learned["OUTPUT_PATH"]] * 2]
    assert {job["nats"] for job in study.jobs} == {True}


def test_all_arms_start_from_the_start_without_its_head(study):
    run("--blocks=A", "--seeds=0")
    exports = [(files, macros) for mode, files, macros in study.ran if mode == "export"]
    ((files, macros),) = exports
    assert "models/fid" in files and macros["CHECKPOINT_PATH"] == Path("start.safetensors")
    first = [m for m in trainings(study) if m["MODEL_DIR"].name.startswith("choose")]
    assert {m["INITIAL_CHECKPOINT_PATH"] for m in first} == {macros["OUTPUT_PATH"]}


def test_distillation_sees_no_labels(study):
    run("--blocks=C", "--seeds=0")
    ranking = trainings(study)
    assert {m["SUPERVISED_WEIGHT"] for m in ranking} == {0.0}
    distilled = [m for m in ranking if m["DISTILLATION_WEIGHT"]]
    assert len(ranking) == 8 and sorted(m["TEMPERATURE"] for m in distilled) == [
        0.1, 0.1, 0.3, 0.3, 1.0, 1.0
    ]  # fmt: skip


def test_single_tasks_have_as_many_examples_as_the_mixture_has_of_them(study):
    run("--blocks=F", "--seeds=0")
    for stage in STAGES:
        assert sum(task_steps(stage, task) for task in TASKS) == pytest.approx(stage.steps, abs=2)
    steps = {task: task_steps(STAGES[0], task) for task in TASKS}
    assert steps["slot_filling"] == steps["fact_verification"] == 2 * steps["which_function"]
    names = {m["MIXTURE_OR_TASK_NAME"] for m in trainings(study)}
    assert {f"pydocs_{task}_renamed" for task in TASKS} <= names
    job = study.jobs[-1]
    assert set(job["runs"]) == set(TASKS) and len(set(job["runs"].values())) == 3


def test_an_interrupted_study_resumes_and_a_finished_one_runs_nothing(study):
    study.fail_at = 6
    with pytest.raises(SystemExit):
        run("--blocks=A", "--seeds=0,1")
    first = Results(Path("experiments/claims.jsonl")).units
    assert len(first) == 2
    before = study.runs()
    study.fail_at = None
    assert len(run("--blocks=A", "--seeds=0,1")) == 6
    assert len(study.runs()) == 2 * 3 * 2 and len(set(before)) == len(before)
    count = len(study.ran)
    assert len(run("--blocks=A", "--seeds=0,1")) == 6
    assert len(study.ran) == count
    assert len(run("--blocks=A", "--seeds=2")) == 9


def test_an_arm_can_be_finished_before_the_others(study):
    units = run("--blocks=T,A,B", "--arms=glimmer", "--seeds=0,1")
    assert {unit["arm"] for unit in units} == {"glimmer"}
    # All rates are equal here, so that the first is the best, and the next beyond it is tried.
    assert len(units) == len(RATES) + 1 + 2 + 2
    assert sum(name.startswith("choose") for name in study.runs()) == len(RATES) + 1 + 2
    # The other arms add theirs to the same study.
    everything = run("--blocks=A", "--seeds=0,1")
    assert [unit["procedure"] for unit in everything] == [units[0]["procedure"]] * len(everything)
    assert {unit["arm"] for unit in everything} == {"fid", "lumen", "glimmer"}


def test_another_start_runs_again(study):
    assert len(run("--blocks=D", "--seeds=0")) == 1
    Path("start.safetensors").write_bytes(b"others")
    units = run("--blocks=D", "--seeds=0")
    assert len(units) == 2 and len({unit["procedure"] for unit in units}) == 2


def test_another_recipe_trains_and_evaluates_again(study, monkeypatch):
    run("--blocks=D", "--seeds=0")
    before = study.runs()
    monkeypatch.setattr(claim_arms, "RECIPE", claim_arms.RECIPE + 1)
    assert len(run("--blocks=D", "--seeds=0")) == 2
    assert len(study.runs()) == 2 * len(before) == len(set(study.runs()))


def test_a_start_that_was_not_completely_written_is_exported_again(study):
    run("--blocks=D", "--seeds=0")
    (described,) = Path("runs").glob("start_*.json")
    described.unlink()
    run("--blocks=D", "--seeds=1")
    assert sum(mode == "export" for mode, *_ in study.ran) == 2


def test_one_process_at_a_time_runs_units(study):
    Path("runs").mkdir()
    with (
        WriterLock(open_folder("runs"), "claims.lock"),
        pytest.raises(ValueError, match="runs.*One writer"),
    ):
        run("--blocks=D", "--seeds=0")
    assert study.ran == []
    assert len(run("--blocks=D", "--seeds=0")) == 1


def test_evaluations_share_no_files(study):
    run("--blocks=A,B,G", "--seeds=0")
    assert len({job["scratch"] for job in study.jobs}) == len(study.jobs) == 5
    assert [path for path in Path("runs").glob("*.json") if "start" not in path.name] == []


def test_rates_that_are_not_tuned_are_named(study, capsys):
    run("--blocks=D", "--seeds=0")
    assert "learning rates of separate are not tuned" in capsys.readouterr().out
    run("--blocks=T,D", "--seeds=0")
    assert "not tuned" not in capsys.readouterr().out


def tune(study, qualities):
    """Units of a study whose arms have these qualities, one for each training of block T."""
    found = iter(list(qualities) * len(TUNED))
    study.quality = lambda job: next(found, 0.5)
    return run("--blocks=T,C", "--seeds=0")


def test_rates_are_tuned_on_dev_and_used(study):
    units = tune(study, (0.4, 0.6, 0.5))
    tuning = [unit for unit in units if unit["block"] == "T"]
    assert [(unit["arm"], unit["rate"]) for unit in tuning] == [
        (arm, rate) for arm in TUNED for rate in RATES
    ]
    assert {job["split"] for job in study.jobs[: len(tuning)]} == {"dev"}
    assert {job["split"] for job in study.jobs[len(tuning) :]} == {"test"}
    assert {unit["rate"] for unit in units if unit["block"] == "C"} == {RATES[1]}
    choosing = [m for m in trainings(study) if "choose" in m["MODEL_DIR"].name]
    rates = {m["LEARNING_RATE"] for m in choosing}
    assert rates == {rate * STAGES[0].settings["LEARNING_RATE"] for rate in RATES}


@pytest.mark.parametrize(("qualities", "beyond"), [((0.6, 0.5, 0.4), 0.5), ((0.4, 0.5, 0.6), 8.0)])
def test_a_best_rate_at_an_edge_is_compared_with_the_next(study, qualities, beyond, capsys):
    units = tune(study, qualities)
    for arm in TUNED:
        rates = [unit["rate"] for unit in units if (unit["block"], unit["arm"]) == ("T", arm)]
        assert rates == [*RATES, beyond]
    # The stand-in's later answers are 0.5, below the best.
    best = RATES[qualities.index(0.6)]
    assert {unit["rate"] for unit in units if unit["block"] == "C"} == {best}
    assert "not tuned" not in capsys.readouterr().out


def test_the_best_known_rate_is_used_until_the_one_beyond_an_edge_is_known(study, capsys):
    results = Results(Path("experiments/claims.jsonl"))
    tune(study, (0.4, 0.5, 0.6))
    kept = [line for line in results.path.read_text().splitlines() if '"rate": 8.0' not in line]
    results.path.write_text("".join(f"{line}\n" for line in kept))
    capsys.readouterr()
    units = run("--blocks=D", "--seeds=0")
    assert [unit["rate"] for unit in units if unit["block"] == "D"] == [max(RATES)]
    assert "learning rates of separate are not tuned" in capsys.readouterr().out


def test_speed_is_measured_again_after_other_work_ran_beside_it(study):
    load = 1.5
    run_module = study.run_module

    def measured(module, job, result, devices=None):
        run_module(module, job, result, devices)
        found = json.loads(Path(result).read_text())
        for each in found["results"].values():
            each["other_load"] = load
        Path(result).write_text(json.dumps(found))

    claims.run_module = measured
    arms = len(BLOCKS["S"].arms)
    assert len(run("--blocks=S")) == arms
    load = 0.0
    assert len(run("--blocks=S")) == 2 * arms
    assert len(run("--blocks=S")) == 2 * arms


def test_every_training_is_a_valid_configuration(study):
    run("--seeds=0")
    seen = {}
    for mode, gin_files, macros in study.ran:
        if mode in ("train", "export"):
            arguments = configured(mode, gin_files, macros)
        if mode == "train":
            seen[macros["MODEL_DIR"].name] = arguments["model"].config
    cuts = {(config.memory_layers, config.rerank_layers) for config in seen.values()}
    assert cuts == {(0, 6), (4, 2), (5, 1)}
    assert {config.freeze_memory for config in seen.values()} == {True, False}
    assert sum(config.separate_reranker for config in seen.values()) == 2


def test_smoke_covers_every_block_in_its_own_folder(study):
    claims.main(["--start=start.safetensors", "--output=runs", "--smoke"])
    assert not Path("experiments").exists()
    units = Results(Path("runs/claims.jsonl")).units
    assert {unit["block"] for unit in units} == BLOCKS.keys()
    assert {job["num_examples"] for job in study.jobs} == {8}


def test_invalid_flags_are_rejected(study, capsys):
    for flags, message in (
        (["--blocks=A,X"], "X"),
        (["--seeds=one"], "'one'"),
        (["--arms=fid,bert"], "'bert'"),
        (["--start=missing.safetensors"], "--models=start"),
    ):
        with pytest.raises(SystemExit):
            run(*flags)
        assert message in capsys.readouterr().err


def test_criteria_name_results_that_their_blocks_have():
    for claim in CLAIMS:
        known = {
            (arm, selection.key)
            for block in claim.blocks
            for arm in BLOCKS[block].arms
            for selection in Scale().selections(ARMS[arm], BLOCKS[block].selections)
        }
        for part in claim.parts:
            if isinstance(part, Rivals):
                named = {(part.arm, part.selection)}
                assert {arm for arm, _ in known} >= set(part.rivals)
            else:
                named = {(arm, key) for arm, key, _ in part.terms}
                assert sum(weight for *_, weight in part.terms) == pytest.approx(0)
            assert named <= known, claim.name
