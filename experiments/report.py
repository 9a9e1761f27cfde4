"""The quickstart's table and plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(report: Mapping[str, Any]) -> str:
    """The report as text: a row per system, the rule-based baselines, and paired differences."""
    tasks = list(report["retriever"]["tasks"])
    head = ["", *(f"{task} EM" for task in tasks), "recall@1", "GFLOP/question", "questions/s"]
    lines = [head]
    for name in ("retriever", "fid", "lumen", "glimmer"):
        system = report[name]
        row = [name, *(f"{system['tasks'][task]['exact_match']:.3f}" for task in tasks)]
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
    text.append("\nExact match of rule-based baselines, and the retriever's recall:")
    for task, rules in report["baselines"].items():
        text.append(f"  {task:18} " + "  ".join(f"{name} {v:.3f}" for name, v in rules.items()))
    n = report["retriever"]["tasks"]["which_function"]["n"]
    text.append(f"\nDifferences on which_function (n = {n}, paired 95 % intervals):")
    for name, row in report["differences"].items():
        text.append(
            f"  {name:38} {row['difference']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    return "\n".join(text)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Plots exact match over counted GFLOP per question, one point per model."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in ("fid", "lumen", "glimmer"):
        cost = 1000 * report[name]["tflop_per_question"]
        quality = 100 * report[name]["exact_match"]
        axes.scatter([cost], [quality], s=60)
        axes.annotate(name, (cost, quality), xytext=(6, 6), textcoords="offset points")
    baseline = 100 * report["retriever"]["exact_match"]
    axes.axhline(baseline, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        "BM25's first title", (0.02, baseline), xycoords=("axes fraction", "data"), va="bottom"
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("GFLOP per question (projections, counted)")
    axes.set_ylabel("exact match, which function, %")
    axes.set_title("Quality over compute on held-out modules")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
