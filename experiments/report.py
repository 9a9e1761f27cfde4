"""The quickstart's table and plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODELS = ("fid", "lumen", "glimmer")
LABELS = {"fid": "FiD", "lumen": "LUMEN", "glimmer": "GLIMMER"}


def table(report: Mapping[str, Any]) -> str:
    """The report as text: a row per system, the rule-based baselines, and paired differences."""
    tasks = list(report["retriever"]["tasks"])
    head = ["", *(f"{task} EM" for task in tasks), "recall@1", "GFLOP/question", "questions/s"]
    lines = [head]
    for name in ("retriever", *MODELS):
        system = report[name]
        row = [name, *(_with_interval(system["tasks"][task]) for task in tasks)]
        row.append(f"{system['recall_at_1']:.3f}")
        if "tflop_per_question" in system:
            row += [f"{1000 * system['tflop_per_question']:.3f}"]
            row += [f"{system['questions_per_second']:.1f}"]
        lines.append(row + [""] * (len(head) - len(row)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    text.append("\n± is half of a 95 % bootstrap interval over pages.")
    text.append("\nExact match of rule-based baselines, and the retriever's recall:")
    for task, rules in report["baselines"].items():
        text.append(f"  {task:18} " + "  ".join(f"{name} {v:.3f}" for name, v in rules.items()))
    sizes = ", ".join(
        f"{result['n']} {task}" for task, result in report["retriever"]["tasks"].items()
    )
    text.append(f"\nDifferences with paired 95 % intervals; questions: {sizes}:")
    for name, row in report["differences"].items():
        text.append(
            f"  {name:45} {row['difference']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    return "\n".join(text)


def _with_interval(result: Mapping[str, Any]) -> str:
    return f"{result['exact_match']:.3f} ±{(result['high'] - result['low']) / 2:.3f}"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Plots exact match over counted GFLOP per question with 95 % intervals, one pane per task."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    from matplotlib import pyplot

    tasks = list(report["retriever"]["tasks"])
    figure, panes = pyplot.subplots(
        1, len(tasks), figsize=(3.2 * len(tasks), 3.6), sharey=True, layout="constrained"
    )
    for pane, task in zip(panes, tasks, strict=True):
        for name in MODELS:
            result = report[name]["tasks"][task]
            match, low, high = (100 * result[key] for key in ("exact_match", "low", "high"))
            cost = 1000 * report[name]["tflop_per_question"]
            bars = [[match - low], [high - match]]
            pane.errorbar([cost], [match], yerr=bars, fmt="o", capsize=3, label=LABELS[name])
        baseline, value = next(iter(report["baselines"][task].items()))
        pane.axhline(100 * value, color="grey", linestyle="--", linewidth=1)
        pane.set_title(
            f"{task.replace('_', ' ')}\n(dashed: {baseline.replace('_', ' ')})", fontsize=10
        )
        pane.set(xlabel="GFLOP per question", ylim=(0, 102))
        pane.set_xlim(left=0)
        pane.spines[["top", "right"]].set_visible(False)
    panes[0].set_ylabel("exact match on held-out modules, %")
    panes[-1].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
