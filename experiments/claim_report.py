"""Writes the report of `experiments.claims`: docs/results.md, its plots, and experiments/claims.json.

Everything comes from the results file; nothing is run.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import claim_plots
from experiments.claim_analysis import MASS, NOT_RUN, Judged, Study, adaptive, is_idle, judge_all
from experiments.claim_arms import ADAPT, ARMS, BLOCKS, MODELS
from experiments.claim_criteria import CLAIMS
from experiments.claim_results import Results
from experiments.claim_statistics import Estimate
from glimmer_jax.pydocs.questions import TASKS

TITLES = {
    "which_function": "which function",
    "slot_filling": "slot filling",
    "fact_verification": "fact verification",
}
INTRODUCTION = """\
# Results

The claims of the GLIMMER paper, tested at the scale of this project: tiny models, trained from
scratch on the built-in corpus, and evaluated on held-out modules. `python -m experiments.claims`
wrote this page from `experiments/claims.jsonl`; `experiments/claims.json` has the same figures.
Quality is exact match in percent, averaged over the three tasks.

All arms start from the same parameters, which know reading exercises only, without a scoring head.
A seed determines the examples, their order and their synthetic names, and is shared by all arms, so
that differences are paired. Intervals are 95 % intervals of the mean over seeds: Student's t over
seeds, and a bootstrap over seeds and pages. A criterion must be met by the outer bounds of both.
The criteria are in `experiments/claim_criteria.py`, and those that a verdict requires are unchanged
since before the first result of this page. How they are combined became stricter afterwards: every
rival counts, where the one with the lowest lower bound did, and one contradicted part decides even
if another, such as speed, has not been measured.

Encoders have seven layers. Unless stated otherwise, three of them are live, LUMEN's memory is
frozen and GLIMMER's is trained, and two of GLIMMER's live layers rerank. GLIMMER keeps three
passages in training. FiD and LUMEN train with the same supervised scores and drop the scoring head.

In training, a gold passage is always among the first three. The exercises of the start mark the
passages that answer them. Compute is counted as in the paper, in 10^9 multiply-adds of a question
with all lengths full, without the memory, which is encoded ahead.

Limits to keep in mind: these are short runs. The shipped models were trained five times as long,
and first on single passages; there, with one run each, GLIMMER is above FiD and LUMEN in all three
tasks (`glimmer_jax/checkpoints/README.md`), while block A compares models that are still learning.
Only the first 1,000 test questions of each task are used. Two of three live layers rerank, where
the paper has a quarter, so that scoring is most of GLIMMER's compute. All models train with three
passages and then, for a few steps, with ten; twenty or thirty occur in evaluation only. The start,
and with it LUMEN's frozen memory, has seen no task. Learning rates are tuned for FiD, LUMEN and
GLIMMER; their variants use the same ones.
"""
COMMANDS = """\
## Commands

<!-- needs: hours -->
```sh
python -m experiments.train_pydocs --models=start   # if the start is missing
python -m experiments.claims --blocks=T             # learning rates, on dev
python -m experiments.claims                        # blocks A to H; rerunning resumes
python -m experiments.claims --blocks=S             # measured speed, on an idle machine
python -m experiments.claims --report               # rewrites this page
```
"""


@dataclasses.dataclass(frozen=True)
class Folders:
    """Folders of the report."""

    docs: Path = Path("docs")  # results.md and plots
    data: Path = Path("experiments")  # claims.json


def write(results: Results, folders: Folders = Folders()) -> None:
    """Writes all files of the report. Raises ValueError without any unit."""
    study = Study(results)
    judged = judge_all(study)
    for folder in (folders.docs, folders.data):
        folder.mkdir(parents=True, exist_ok=True)
    plots = claim_plots.write(study, folders.docs)
    page = folders.docs / "results.md"
    page.write_text(text(study, judged, plots), encoding="utf-8")
    summary = folders.data / "claims.json"
    summary.write_text(json.dumps(as_json(study, judged), indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {page}, {summary} and {', '.join(str(folders.docs / name) for name in plots)}.")


def text(study: Study, judged: dict[str, tuple[str, list[Judged]]], plots: dict[str, str]) -> str:
    """The page, in Markdown.

    Args:
      study: the results.
      judged: of `judge_all`.
      plots: file name -> caption.
    """
    parts = [INTRODUCTION, _claims(study, judged)]
    parts += [f"![{caption}]({name})\n" for name, caption in plots.items()]
    parts += [_parts(judged), _baselines(study), _by_task(study)]
    parts += [*(_block(study, block) for block in BLOCKS), _adaptive(study)]
    parts += [_procedure(study), COMMANDS]
    return "\n".join(part for part in parts if part)


def as_json(study: Study, judged: dict[str, tuple[str, list[Judged]]]) -> dict[str, Any]:
    """Verdicts, contrasts and the results of every arm, without the answers to single questions."""
    claims = {}
    for claim in CLAIMS:
        verdict, parts = judged[claim.name]
        rows = [_finite(dataclasses.asdict(part)) for part in parts]
        hours = round(study.hours(claim.blocks), 2)
        claims[claim.name] = {
            "claim": claim.text, "verdict": verdict, "hours": hours, "parts": rows
        }  # fmt: skip
    units = []
    for (block, arm, seed), unit in sorted(study.units.items()):
        results = {
            key: {name: value for name, value in result.items() if name not in ("hits", "nats")}
            for key, result in unit["results"].items()
        }
        units.append(
            {
                "block": block,
                "arm": arm,
                "seed": seed,
                "rate": unit["rate"],
                "seconds": unit["seconds"],
                "results": results,
            }
        )
    return {
        "claims": claims,
        "baselines": study.baselines,
        "procedure": study.procedure,
        "units": units,
    }


def _finite(part: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an unbounded interval becomes null."""
    if part["estimate"] is not None:
        for name in ("t", "bootstrap"):
            bounds = part["estimate"][name]
            part["estimate"][name] = bounds if abs(bounds[0]) != float("inf") else None
    return part


def _claims(study: Study, judged: dict[str, tuple[str, list[Judged]]]) -> str:
    rows = []
    for claim in CLAIMS:
        verdict, _ = judged[claim.name]
        name = f"{claim.name}. " if claim.name.isdigit() else ""
        hours = "" if verdict == NOT_RUN else f"{study.hours(claim.blocks):.1f}"
        rows.append([name + claim.text, f"**{verdict}**", ", ".join(claim.blocks), hours])
    head = ["claim", "verdict", "blocks", "hours of these blocks"]
    return "## Claims\n\n" + table(head, rows)


def _parts(judged: dict[str, tuple[str, list[Judged]]]) -> str:
    rows = []
    for claim in CLAIMS:
        for part in judged[claim.name][1]:
            kind = part.text if part.required else f"{part.text} (not part of the criterion)"
            estimate = _estimate(part.estimate, part.nats)
            rows.append([claim.name, kind, *estimate, part.verdict])
    head = ["claim", "contrast", "difference", "t over seeds", "bootstrap", "each seed", "verdict"]
    return (
        "## Criteria and contrasts\n\nDifferences are in points of exact match, or in nats.\n\n"
        + table(head, rows)
    )


def _estimate(found: Estimate | None, nats: bool = False) -> list[str]:
    """Points of exact match, or nats."""
    if found is None:
        return ["", "", "", ""]

    def show(value: float) -> str:
        return f"{value:+.3f}" if nats else f"{100 * value:+.1f}"

    bounds = [
        "-" if abs(low) == float("inf") else f"{show(low)} to {show(high)}"
        for low, high in (found.t, found.bootstrap)
    ]
    return [show(found.mean), *bounds, " ".join(map(show, found.by_seed))]


def _each(found: Estimate) -> str:
    return " ".join(f"{100 * value:.1f}" for value in found.by_seed)


def _by_task(study: Study) -> str:
    """Each seed of the three systems, by task."""
    rows = []
    for arm in MODELS:
        key = ARMS[arm].default.key
        results = study.seeds(arm, key).values()
        for task in TASKS if results else ():
            each = [100 * result["exact_match"][task] for result in results]
            mean = sum(each) / len(each)
            rows.append(
                [ARMS[arm].about, TITLES[task], f"{mean:.1f}", " ".join(f"{x:.1f}" for x in each)]
            )
    if not rows:
        return ""
    return (
        "## Seeds by task\n\nTen passages are retrieved, of which GLIMMER keeps one.\n\n"
        + table(["arm", "task", "mean", "each seed"], rows)
    )


def _block(study: Study, letter: str) -> str:
    """A block's arms and selections; empty if none has run."""
    block = BLOCKS[letter]
    if block.speed or letter == "G":
        return ""
    rows = []
    for arm in block.arms:
        units = [unit for (name, of, _), unit in study.units.items() if (name, of) == (letter, arm)]
        keys = dict.fromkeys(key for unit in units for key in unit["results"])
        for key in keys:
            seeds, found = study.contrast([(arm, key, 1.0)])
            if found is None:
                continue
            results = study.seeds(arm, key, "nats" if block.nats else "hits").values()
            order, retrieved, kept = key.split(":")
            by_task = [
                f"{100 * sum(x['exact_match'][task] for x in results) / len(seeds):.1f}"
                for task in TASKS
            ]
            recall = sum(sum(x["recall"].values()) / len(TASKS) for x in results) / len(seeds)
            speed = study.speed(arm, key)
            nats = [sum(x["mean_nats"].values()) / len(TASKS) for x in results if block.nats]
            rows.append(
                [
                    ARMS[arm].about, order, retrieved, kept, *by_task,
                    f"{100 * found.mean:.1f}", _each(found), f"{100 * recall:.1f}",
                    f"{study.gflop(arm, key):.3f}", "" if speed is None else _rate(speed),
                    *([f"{sum(nats) / len(nats):.3f}"] if block.nats else []),
                ]
            )  # fmt: skip
    if not rows:
        return ""
    head = [
        "arm", "order", "K", "m", *TITLES.values(), "mean", "each seed", "recall of the kept",
        "GFLOP", "questions/s", *(["nats per token"] if block.nats else []),
    ]  # fmt: skip
    note = f"{block.note}\n\n" if block.note else ""
    title = f"## Block {letter}: {block.title}\n\n"
    return title + note + table(head, rows) + (_recall(study) if letter == "B" else "")


def _rate(speed: dict[str, Any]) -> str:
    beside = "" if is_idle(speed) else " (beside other work)"
    return f"{speed['questions_per_second']:.0f}{beside}"


def _recall(study: Study) -> str:
    """Recall of the kept passages by order, K and m."""
    found: dict[str, list[float]] = {}
    for (block, _, _), unit in study.units.items():
        if block == "B":
            for key, result in unit["results"].items():
                found.setdefault(key, []).append(sum(result["recall"].values()) / len(TASKS))
    keys = [key.split(":") for key in found]
    columns = sorted({(int(k), int(m)) for _, k, m in keys}, key=lambda km: (km[1], km[0]))
    rows = []
    for order in dict.fromkeys(order for order, _, _ in keys):
        values = (found.get(f"{order}:{k}:{m}") for k, m in columns)
        rows.append([order, *("" if x is None else f"{100 * sum(x) / len(x):.1f}" for x in values)])
    head = ["order", *(f"K = {k}, m = {m}" for k, m in columns)]
    return "\nRecall of the kept passages, mean over tasks and seeds:\n\n" + table(head, rows)


def _adaptive(study: Study) -> str:
    rows = [
        [f"{row['threshold']:g}", f"{row['gflop']:.3f}", *_estimate(row["estimate"])]
        for row in adaptive(study)
    ]
    if not any(MASS in key for key in study.selections("glimmer")):
        return ""
    head = ["share", "GFLOP", "points", "t over seeds", "bootstrap", "each seed"]
    return (
        f"## Block G: {BLOCKS['G'].title}\n\nGLIMMER keeps the fewest of ten passages that reach a "
        "share of the reranker's softmax,\ncompared with a fixed m at equal mean compute.\n\n"
        + table(head, rows)
    )


def _baselines(study: Study) -> str:
    rows = [
        [TITLES[task], name.replace("_", " "), f"{100 * value:.1f}"]
        for task, rules in study.baselines.items()
        for name, value in rules.items()
    ]
    return (
        "## Baselines without a model\n\nRules of `glimmer_jax/pydocs/baselines.py` over ten passages, "
        "and the retriever's recall.\n\n" + table(["task", "rule", "%"], rows)
    )


def _procedure(study: Study) -> str:
    stages = [
        [
            stage["name"],
            stage["settings"]["MIXTURE_OR_TASK_NAME"].replace("_", " "),
            str(stage["settings"]["TASK_FEATURE_LENGTHS"]["passages"][0]),
            str(stage["steps"]),
            f"{stage['settings']['LEARNING_RATE']:g}",
            "of block H" if stage["name"] == ADAPT.name else "all",
        ]
        for stage in study.procedure["stages"]
    ]
    rates = {arm: unit["rate"] for (_, arm, _), unit in study.units.items()}
    rows = []
    for arm, rate in rates.items():
        source = ARMS[arm].model
        dev = ", ".join(f"{at:g}: {100 * x:.1f}" for at, x in _on_dev(study, source).items())
        of = "" if source == arm else f" ({ARMS[source].about})"
        rows.append([ARMS[arm].about, f"{rate:g}", dev + of if dev else "not tuned"])
    left_out = f"\n{study.stale} units of other settings are left out.\n" if study.stale else ""
    trained = [block for block in BLOCKS if not BLOCKS[block].speed]
    tuning = sum(sum(unit["seconds"].values()) for unit in study.tuning) / 3600
    return (
        f"## Procedure\n\n{study.hours(trained):.1f} hours in {len(study.units)} units, and "
        f"{tuning:.1f} hours of tuning, each on one core with other work beside it.\n{left_out}\n"
        + table(["stage", "task", "K", "steps", "rate", "arms"], stages)
        + "\nFactors of the stages' learning rates, chosen on dev with a seed of their own for FiD, "
        "LUMEN and\nGLIMMER; variants use those of their model:\n\n"
        + table(["arm", "factor", "exact match on dev by factor"], rows)
    )


def _on_dev(study: Study, arm: str) -> dict[float, float]:
    """Exact match on dev by learning rate, ascending; empty without tuning."""
    key = ARMS[arm].default.key
    tuned = {
        unit["rate"]: sum(unit["results"][key]["exact_match"].values()) / len(TASKS)
        for unit in study.tuning
        if unit["arm"] == arm
    }
    return dict(sorted(tuned.items()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
