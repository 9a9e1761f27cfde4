"""The rows of `question_latency` as tables in Markdown: `python -m benchmarks.table latency.json`."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

HEAD = (
    *("system", "dtype", "seconds", "GFLOP", "peak GB"),
    *("faster than PyTorch float32", "than bfloat16", "of matrix peak", "of bound", "runs"),
)


def render(rows: Sequence[Row]) -> str:
    """One table per number of passages, in the order of the rows."""
    tables = []
    for passages in sorted({row["passages"] for row in rows}):
        selected = [row for row in rows if row["passages"] == passages]
        base = {
            row["dtype"]: row["median_seconds"]
            for row in selected
            if row["system"] == "pytorch_fid"
        }
        lines = [f"**{passages} passages**", "", _line(HEAD), _line(["---"] * len(HEAD))]
        lines += [_line(_cells(row, base)) for row in selected]
        lines += ["", *_variants(selected)]
        tables.append("\n".join(lines).rstrip())
    return "\n\n".join(tables)


def _cells(row: Row, base: dict[str, float]) -> list[str]:
    seconds = row["median_seconds"]
    ratios = [f"{base[d] / seconds:.2f}" if d in base else "" for d in ("float32", "bfloat16")]
    rate = row["flops"] / seconds / row["peak_flops_per_second"]
    runs = f"{row['undisturbed_runs']} (-{row['discarded_runs']})"
    return [
        row["system"],
        row["dtype"],
        f"{seconds:.3f}",
        f"{row['flops'] / 1e9:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        *ratios,
        f"{rate:.2f}",
        f"{row['bound_seconds'] / seconds:.2f}",
        runs if row["undisturbed_runs"] else f"{runs}, disturbed",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _variants(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['system']} in {row['dtype']}: the best of its variants is {row['variant']}."
        for row in rows
        if "variant" in row
    ]


if __name__ == "__main__":
    print(render(json.loads(pathlib.Path(sys.argv[1]).read_text())))
