"""All steps on the built-in corpus, in minutes. Every step is a command, printed before it runs.

    python -m experiments.quickstart [--output=DIR] [--train_steps=N] [--num_examples=N]

1. Passages and questions from Python's own documentation.
2. Retrieval with BM25.
3. A short fine-tuning of the shipped GLIMMER.
4. Memory for LUMEN and GLIMMER.
5. Evaluation of FiD, LUMEN and GLIMMER on held-out modules.
6. A few answers.
7. A table, `report.json` and `report.png`.
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

NUM_ANSWERS = 4
# GLIMMER trains with three kept passages and answers with one, as the shipped model does.
KEPT = {"NUM_KEPT": 1}
# As the shipped model's last stage: no distillation, and a low rate. With the gin file's distillation
# and rate, 100 steps made slots and facts worse by 0.11.
FINE_TUNING = {"DISTILLATION_WEIGHT": 0.0, "LEARNING_RATE": 2e-4}
# Initial parameters of each model; glimmer_jax/checkpoints/README.md describes their training.
SHIPPED = {name: CHECKPOINTS / f"pydocs_{name}.safetensors" for name in report.MODELS}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all steps. Exits at the first failing command, with its exit code."""
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
        "examples/pydocs_passages",
        CORPUS_DIR=data / "corpus",
        PASSAGES_DIR=data / "passages",
        OVERWRITE=True,
    )
    glimmer(
        "retrieve",
        "examples/pydocs_retrieve",
        QUESTIONS=f"{data}/corpus/questions/*.jsonl",
        PASSAGES_DIR=data / "passages",
        DATA_DIR=data / "retrieved",
    )
    shared = {"PASSAGES_DIR": data / "passages", "DATA_DIR": data / "retrieved"}
    # The learning rate decays to 0 at the last step, so each number of steps is a separate run.
    tuned = runs / f"glimmer_{args.train_steps}"
    glimmer(
        "train",
        "examples/pydocs_glimmer_train",
        MODEL_DIR=tuned,
        INITIAL_CHECKPOINT_PATH=SHIPPED["glimmer"],
        TRAIN_STEPS=args.train_steps,
        LOG_EVERY=10,
        DATA_DIR=data / "retrieved",
        **FINE_TUNING,
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
            "runs/build_memory",
            CHECKPOINT_PATH=weights[name],
            PASSAGES_DIR=data / "passages",
            MEMORY_DIR=memory,
        )
    for name in report.MODELS:
        memory_macros: dict[str, Any] = {"MEMORY_DIR": memories[name]} if name in memories else {}
        memory_macros |= KEPT if name == "glimmer" else {}
        glimmer(
            "eval",
            "examples/pydocs_eval",
            CHECKPOINT_PATH=weights[name],
            EVALUATOR_NUM_EXAMPLES=args.num_examples,
            EVAL_OUTPUT_DIR=runs / f"{name}_eval",
            OVERWRITE=True,
            **shared,
            **memory_macros,
        )
    _answer_a_few(data, runs, weights["glimmer"], memories["glimmer"])

    records = {record["id"]: record for record in Passages.open(data / "passages").records()}
    results = collect(data / "retrieved", runs, records)
    results["seconds"] = round(time.monotonic() - started)
    Path("report.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    report.plot(results, Path("report.png"))
    print(report.table(results))
    print(f"\nWrote report.json and report.png after {results['seconds']} seconds.")


def _answer_a_few(data: Path, runs: Path, checkpoint: Path, memory: Path) -> None:
    """Answers the first questions of each test set with `infer` and prints the answers."""
    questions = []
    for task in TASKS:
        lines = read_json_lines(data / "retrieved" / f"{task}-test.jsonl")
        questions += [line for _, (_, line) in zip(range(NUM_ANSWERS), lines, strict=False)]
    write_json_lines(runs / "questions.jsonl", questions)
    glimmer(
        "infer",
        "examples/pydocs_infer",
        CHECKPOINT_PATH=checkpoint,
        PASSAGES_DIR=data / "passages",
        MEMORY_DIR=memory,
        QUESTIONS=runs / "questions.jsonl",
        INFER_OUTPUT_DIR=runs / "answers",
        OVERWRITE=True,
        **KEPT,
    )
    answers = {
        line["id"]: line
        for _, line in read_json_lines(runs / "answers" / "predictions-questions.jsonl")
    }
    for question in questions:
        answer = answers[question["id"]]
        best = answer["passages"][0]["title"]
        gold, predicted = (line["output"][0]["answer"] for line in (question, answer))
        print(f"\n  {question['input']}\n    -> {predicted}  (gold: {gold}; best passage: {best})")


def collect(
    retrieved: Path, runs: Path, records: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The report: scores of rule-based baselines, the retriever and three models.

    Args:
      retrieved: folder of the retrieved test files.
      runs: folder with `<model>_eval/metrics.json` and `predictions-pydocs_<task>.jsonl`.
      records: passage id -> `{"title", "text"}`.

    Returns:
      A dictionary with these keys:

      * `retriever` and each model: `exact_match` and `recall_at_1` on the which-function task, and
        `tasks`, where `low` and `high` are the 95 % bootstrap interval of exact match over pages;
        models also have `tflop_per_question` and `questions_per_second`.
      * `baselines`: by task, exact match of each rule of `pydocs.baselines`, and the retriever's
        recall.
      * `differences`: of exact match and recall, with paired 95 % bootstrap intervals over pages.
    """
    rule_scores: dict[str, dict[str, float]] = {}
    systems: dict[str, Any] = {"retriever": {"tasks": {}}}
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name in report.MODELS:
        metrics = json.loads((runs / f"{name}_eval" / "metrics.json").read_text(encoding="utf-8"))
        systems[name] = {
            "tflop_per_question": metrics["tflop_per_question"],
            "questions_per_second": metrics["questions_per_second"],
            "tasks": {},
        }
    for task in TASKS:
        test_file = retrieved / f"{task}-test.jsonl"
        examples = {line["id"]: line for _, line in read_json_lines(test_file)}
        for name in report.MODELS:
            path = runs / f"{name}_eval" / f"predictions-pydocs_{task}.jsonl"
            predictions = [line for _, line in read_json_lines(path)]
            rows[name, task] = _scores(task, predictions, examples)
        evaluated = [examples[line["id"]] for line in predictions]
        rows["retriever", task] = _scores(
            task, [_first_title(line, records) for line in evaluated], examples
        )
        rules = baselines.scores(task, evaluated, records)
        rule_scores[task] = {name: sum(values) / len(values) for name, values in rules.items()}
    for (name, task), scores in rows.items():
        match = qa.bootstrap(scores["exact_match"], groups=scores["groups"])
        systems[name]["tasks"][task] = {
            "n": match["n"],
            "exact_match": match["mean"],
            "low": match["low"],
            "high": match["high"],
            "recall_at_1": sum(scores["recall_at_1"]) / match["n"],
        }
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
    """The retriever's prediction: the title of its first passage."""
    return {
        "id": line["id"],
        "prediction": records[line["retrieved"][0]["id"]]["title"],
        "passage_ids": [passage["id"] for passage in line["retrieved"]],
    }


def _scores(
    task: str, predictions: Sequence[Mapping[str, Any]], examples: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """Scores of each prediction, in order, and the page of its question (`groups`)."""
    scores: dict[str, list[Any]] = {"exact_match": [], "recall_at_1": [], "groups": []}
    for line in predictions:
        example = examples[line["id"]]
        gold_ids = {passage["id"] for passage in example["retrieved"] if passage["gold"]}
        answers = [output["answer"] for output in example["output"]]
        scores["exact_match"].append(qa.match_of(answers, line["prediction"]))
        scores["recall_at_1"].append(float(line["passage_ids"][0] in gold_ids))
        scores["groups"].append(example["output"][0]["provenance"][0]["wikipedia_id"])
    return scores


def _differences(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    pairs = [
        ("glimmer", "retriever", "recall_at_1", "which_function"),
        ("glimmer", "retriever", "exact_match", "which_function"),
    ]
    pairs += [
        (a, b, "exact_match", task)
        for a, b in (("glimmer", "fid"), ("fid", "lumen"))
        for task in TASKS
    ]
    return {
        f"{a} - {b}, {metric}, {task}": qa.paired_bootstrap(
            rows[a, task][metric], rows[b, task][metric], groups=rows[a, task]["groups"]
        )
        for a, b, metric, task in pairs
    }


if __name__ == "__main__":
    main()
