"""Recall of passages: how often a gold one is among the first, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glimmer_jax.kilt import provenance

Example = Mapping[str, Any]


def recall(examples: Sequence[Example], at: Sequence[int]) -> dict[str, float]:
    """`recall_at_N` over examples with provenance, and their number `questions`."""
    asked = [example for example in examples if provenance(example)]
    found: dict[str, float] = {"questions": len(asked)}
    for n in at:
        hits = sum(any(one["gold"] for one in example["retrieved"][:n]) for example in asked)
        found[f"recall_at_{n}"] = hits / max(len(asked), 1)
    return found


def mean_recall(files: Sequence[Sequence[Example]], at: Sequence[int]) -> dict[str, float]:
    """`recall`, every file counting the same."""
    each = [recall(examples, at) for examples in files]
    return {name: float(np.mean([row[name] for row in each])) for name in each[0]}


def format_report(report: Mapping[str, Mapping[str, float]]) -> str:
    """The numbers as a table, a row for each file."""
    columns = list(dict.fromkeys(name for row in report.values() for name in row))
    width = max(len(name) for name in report)
    lines = [" " * width + "".join(f"  {name.replace('recall_at_', 'R@'):>9}" for name in columns)]
    for name, row in report.items():
        cells = (f"  {row[c]:9.3f}" if c != "questions" else f"  {int(row[c]):9d}" for c in columns)
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)
