"""The whole road on the built-in corpus, in minutes: every step a command that is printed first.

    python -m experiments.quickstart [--output=DIR] [--train_steps=N] [--num_examples=N]

Passages and questions from Python's own documentation, BM25, a short fine-tuning that goes on from
the shipped GLIMMER, memory for LUMEN and GLIMMER, evaluation of FiD, LUMEN and GLIMMER on modules
that none of them was trained on, a few answers; then a table, `report.json` and `report.png`.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import report
from experiments.command import glimmer
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.metrics import qa
from glimmer_jax.pydocs import baselines
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.shipped import CHECKPOINTS
from glimmer_jax.storage.json_lines import read_json_lines, write_json_lines

MODELS = ("fid", "lumen", "glimmer")
NUM_ANSWERS = 4
# Parameters that each model begins with; how they were made: glimmer_jax/checkpoints.
SHIPPED = {name: CHECKPOINTS / f"pydocs_{name}.safetensors" for name in MODELS}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all steps; stops at the first that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder of the runs"
    )
    parser.add_argument("--train_steps", type=int, default=100, help="updates of the fine-tuning")
    parser.add_argument("--num_examples", type=int, default=300, help="test questions of each task")
    args = parser.parse_args(argv)
    started = time.monotonic()
    data, runs = args.output / "data", args.output / "runs"

    glimmer(
        "passages",
        "pydocs_passages",
        CORPUS_DIR=data / "corpus",
        PASSAGES_DIR=data / "passages",
        OVERWRITE=True,
    )
    glimmer(
        "retrieve",
        "pydocs_retrieve",
        QUESTIONS=f"{data}/corpus/questions/*.jsonl",
        PASSAGES_DIR=data / "passages",
        DATA_DIR=data / "retrieved",
    )
    shared = {"PASSAGES_DIR": data / "passages", "DATA_DIR": data / "retrieved"}
    # The rate falls to nothing at the last step, so another number of steps is another run.
    tuned = runs / f"glimmer_{args.train_steps}"
    glimmer(
        "train",
        "pydocs_glimmer_train",
        MODEL_DIR=tuned,
        INITIAL_CHECKPOINT_PATH=SHIPPED["glimmer"],
        TRAIN_STEPS=args.train_steps,
        LOG_EVERY=10,
        DATA_DIR=data / "retrieved",
    )
    weights = {**SHIPPED, "glimmer": tuned}
    # A memory belongs to one encoder.
    memories = {
        "lumen": runs / "lumen_memory",
        "glimmer": runs / f"glimmer_{args.train_steps}_memory",
    }
    for name, memory in memories.items():
        glimmer(
            "build_memory",
            f"pydocs_{name}_memory",
            CHECKPOINT_PATH=weights[name],
            PASSAGES_DIR=data / "passages",
            MEMORY_DIR=memory,
        )
    for name in MODELS:
        given = {"MEMORY_DIR": memories[name]} if name in memories else {}
        glimmer(
            "eval",
            f"pydocs_{name}_eval",
            CHECKPOINT_PATH=weights[name],
            EVALUATOR_NUM_EXAMPLES=args.num_examples,
            EVAL_OUTPUT_DIR=runs / f"{name}_eval",
            **shared,
            **given,
        )
    _answer_a_few(data, runs, weights["glimmer"], memories["glimmer"])

    records = {one["id"]: one for one in Passages.open(data / "passages").records()}
    found = collect(data / "retrieved", runs, records)
    found["seconds"] = round(time.monotonic() - started)
    Path("report.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    report.plot(found, Path("report.png"))
    print(report.table(found))
    print(f"\nWritten: report.json, report.png. {found['seconds']} seconds in all.")


def _answer_a_few(data: Path, runs: Path, checkpoint: Path, memory: Path) -> None:
    """Answers the first questions of the test set with `infer` and prints them."""
    asked = []
    for task in TASKS:
        lines = read_json_lines(data / "retrieved" / f"{task}-test.jsonl")
        asked += [line for _, (_, line) in zip(range(NUM_ANSWERS), lines, strict=False)]
    write_json_lines(runs / "questions.jsonl", asked)
    glimmer(
        "infer",
        "pydocs_glimmer_infer",
        CHECKPOINT_PATH=checkpoint,
        PASSAGES_DIR=data / "passages",
        MEMORY_DIR=memory,
        QUESTIONS=runs / "questions.jsonl",
        INFER_OUTPUT_DIR=runs / "answers",
    )
    answers = {
        line["id"]: line
        for _, line in read_json_lines(runs / "answers" / "predictions-questions.jsonl")
    }
    for question in asked:
        answer = answers[question["id"]]
        best = answer["passages"][0]["title"]
        gold, given = (one["output"][0]["answer"] for one in (question, answer))
        print(f"\n  {question['input']}\n    -> {given}  (gold: {gold}; read: {best})")


def collect(
    retrieved: Path, runs: Path, records: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The report: scores of simple rules, the retriever and three models on the same test questions.

    Args:
      retrieved: folder of the retrieved test files.
      records: passage id -> `{"title", "text"}`.
      runs: folder with `<model>_eval/metrics.json` and `predictions-pydocs_<task>.jsonl`.

    Returns:
      For `retriever` and each model `exact_match` and `recall_at_1` on the which-function task and
      `tasks`; for models also `tflop_per_question` and `questions_per_second`; `baselines`, the exact
      match of each rule of `pydocs.baselines` by task, and the retriever's recall; and `differences`
      of which-function exact match and recall with paired 95 % intervals, pages resampled whole.
    """
    rule_scores: dict[str, dict[str, float]] = {}
    systems: dict[str, Any] = {"retriever": {"tasks": {}}}
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name in MODELS:
        metrics = json.loads((runs / f"{name}_eval" / "metrics.json").read_text(encoding="utf-8"))
        systems[name] = {
            "tflop_per_question": metrics["tflop_per_question"],
            "questions_per_second": metrics["questions_per_second"],
            "tasks": {},
        }
    for task in TASKS:
        test_file = retrieved / f"{task}-test.jsonl"
        examples = {line["id"]: line for _, line in read_json_lines(test_file)}
        for name in MODELS:
            path = runs / f"{name}_eval" / f"predictions-pydocs_{task}.jsonl"
            predictions = [line for _, line in read_json_lines(path)]
            rows[name, task] = _scores(task, predictions, examples)
        asked = [examples[line["id"]] for line in predictions]
        rows["retriever", task] = _scores(
            task, [_first_title(line, records) for line in asked], examples
        )
        rules = baselines.scores(task, asked, records)
        rule_scores[task] = {name: sum(found) / len(found) for name, found in rules.items()}
    for (name, task), scores in rows.items():
        means = {key: sum(v) / len(v) for key, v in scores.items() if key != "groups"}
        systems[name]["tasks"][task] = {"n": len(scores["groups"]), **means}
    for system in systems.values():
        main_task = system["tasks"]["which_function"]
        system["exact_match"], system["recall_at_1"] = (
            main_task["exact_match"],
            main_task["recall_at_1"],
        )
    return {**systems, "baselines": rule_scores, "differences": _differences(rows)}


def _first_title(
    line: Mapping[str, Any], records: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The retriever as a reader: it answers every question with its first passage's page."""
    return {
        "id": line["id"],
        "prediction": records[line["retrieved"][0]["id"]]["title"],
        "passage_ids": [one["id"] for one in line["retrieved"]],
    }


def _scores(
    task: str, predictions: Sequence[Mapping[str, Any]], examples: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Scores of each prediction, in order, and the page it is about (`groups`)."""
    scores: dict[str, list[Any]] = {"exact_match": [], "recall_at_1": [], "groups": []}
    for line in predictions:
        example = examples[line["id"]]
        gold_ids = {one["id"] for one in example["retrieved"] if one["gold"]}
        answers = [one["answer"] for one in example["output"]]
        scores["exact_match"].append(qa.match_of(answers, line["prediction"]))
        scores["recall_at_1"].append(float(line["passage_ids"][0] in gold_ids))
        scores["groups"].append(example["output"][0]["provenance"][0]["wikipedia_id"])
    return scores


def _differences(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    pairs = (
        ("glimmer", "retriever", "recall_at_1"),
        ("glimmer", "retriever", "exact_match"),
        ("glimmer", "fid", "exact_match"),
        ("fid", "lumen", "exact_match"),
    )
    found = {}
    for a, b, metric in pairs:
        left, right = rows[a, "which_function"], rows[b, "which_function"]
        found[f"{a} - {b}, {metric}"] = qa.paired_bootstrap(
            left[metric], right[metric], groups=left["groups"]
        )
    return found


if __name__ == "__main__":
    main()
