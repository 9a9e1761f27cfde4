"""The paper's settings on TPU slices, as a table in docs/preflight.md: what fits, and what it costs.

    python -m benchmarks.preflight_table [--only=large] [--output=docs/preflight.md]

Every row is one `--run_mode=preflight` of the shipped gin files, in a process of its own; nothing is
run on a TPU. Rows that are in the file already are kept, so that the table grows over several runs;
one that is deleted there is compiled again.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from typing import Any

GIB = 2**30
# Size, slice, extra settings: training as the paper does it, 128 questions a step.
TRAIN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("base", "v5e:2x2", {}),
    ("base", "v5e:4x4", {}),
    ("base", "v6e:4x4", {}),
    ("base", "v5p:2x2x2", {}),
    ("large", "v5e:8x8", {}),
    ("large", "v6e:8x8", {}),
    ("large", "v4:4x4x4", {}),
    ("large", "v5p:2x4x4", {}),
    ("xl", "v5p:4x4x4", {}),
    ("xl", "v6e:16x16", {}),
    ("xl", "tpu7x:4x4x4", {}),
    ("xxl", "v5p:4x8x8", {}),
)
INFER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("base", "v5e:2x2", {"BATCH_SIZE": 8}),
    ("large", "v6e:2x2", {"BATCH_SIZE": 8}),
    ("large", "v6e:2x4", {"BATCH_SIZE": 1}),
    ("xl", "v5p:2x2x1", {"BATCH_SIZE": 4}),
    ("xl", "v6e:2x4", {"BATCH_SIZE": 8}),
)
MODELS = {"train": ("fid", "glimmer"), "infer": ("glimmer",)}
RUNS = {"train": "finetune", "infer": "infer"}
HEAD = (
    "| job | model | size | slice | chips | mesh | batch | fits | GiB a chip | of HBM | "
    "TFLOP a step | peak bound | compiler's estimate |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)
TEXT = """# What fits where

Written by `python -m benchmarks.preflight_table`; a line is one `--run_mode=preflight` of the shipped gin
files with XLA's TPU compiler ({compiler}). **Nothing here has run on a TPU**: bytes and FLOPs are
those of the compiled program, the peak bound is FLOPs over the chips' published peak, and the last
column is the compiler's own expectation, with the model's FLOPs at that time as a share of the peak;
it knows no data loading and no slow host. 48 question, 304 passage and 32 answer tokens, 40 passages,
of which GLIMMER keeps 25. A step is one batch: `train` computes all passages from tokens, `infer`
answers from memory. Where the shipped settings do not fit, the next line is the nearest that do.

"""


def command(job: str, model: str, size: str, topology: str, changes: dict[str, Any]) -> list[str]:
    """The command of one line, without the place for its report."""
    flags = [f"--gin_file=gin/{file}.gin" for file in (f"models/{model}", f"sizes/{size}")]
    flags.append(f"--gin_file=gin/runs/{RUNS[job]}.gin")
    if job == "infer":
        # Any folder: with one, passages come as memory.
        changes = {"MEMORY_DIR": "memory", **changes}
    flags += [f"--gin.{name}={value!r}" for name, value in changes.items()]
    return [f"--topology={topology}", *flags]


def row(job: str, model: str, size: str, report: dict[str, Any], settings: str) -> str:
    """One line of the table."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1) or "1"
    total, hbm = report["bytes_per_chip"]["total"], report["hbm_bytes_per_chip"]
    estimate = report["estimated_step_seconds"]
    use = report["model_flop_utilisation"]
    cells = (
        job,
        model,
        size + settings,
        report["topology"],
        report["chips"],
        mesh,
        report["batch_size"],
        "yes" if report["fits"] else "no",
        f"{total / GIB:.1f}",
        f"{total / hbm:.0%}",
        f"{report['flops_per_step'] / 1e12:,.0f}",
        f"{report['compute_seconds']:.3f} s",
        f"{estimate:.3f} s, {use:.0%}" if estimate else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def measure(job: str, model: str, size: str, topology: str, changes: dict[str, Any]) -> list[str]:
    """The line of a setting, and where it does not fit, of the nearest one that does."""
    found: list[str] = []
    settings = ""
    while True:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "report.json"
            flags = command(job, model, size, topology, changes)
            subprocess.run(
                [sys.executable, "-m", "glimmer_jax.main", "--run_mode=preflight", *flags]
                + [f"--json={path}"],
                check=True,
            )
            report = json.loads(path.read_text())
        found.append(row(job, model, size, report, settings))
        if report["fits"] or not report["nearest"] or settings:
            return found
        changes = {**changes, **report["nearest"][0]}
        settings = " " + " ".join(f"`{k}={v}`" for k, v in changed(report).items())


def changed(report: dict[str, Any]) -> dict[str, Any]:
    """What the nearest setting that fits changes; preflight's own mesh is in a column of its own."""
    chosen = report["mesh_flags"].items()
    return {k: v for k, v in report["nearest"][0].items() if (k, v) not in chosen}


def key(line: str) -> tuple[str, ...]:
    """What a line is about: job, model, size, slice; of one that does not fit, of the next one too."""
    cells = [cell.strip() for cell in line.split("|")]
    return (*cells[1:3], cells[3].split(" ")[0], cells[4])


def place(line: str) -> int:
    """Of a line in the table, as the settings above stand; it and the nearest that fits share one."""
    job, model, size, topology = key(line)
    rows = [(size, topology) for size, topology, _ in {"train": TRAIN, "infer": INFER}[job]]
    first = 0 if job == "train" else len(TRAIN)
    return (first + rows.index((size, topology))) * 2 + MODELS[job].index(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="docs/preflight.md")
    parser.add_argument("--only", help="a size")
    parser.add_argument("--job", choices=sorted(RUNS))
    args = parser.parse_args()
    output = pathlib.Path(args.output)
    lines = output.read_text().splitlines() if output.exists() else []
    lines = [line for line in lines if line.startswith(("| train |", "| infer |"))]
    try:
        compiler = f"libtpu {version('libtpu')}"
    except PackageNotFoundError:
        sys.exit(
            "preflight_table: libtpu is not installed: pip install -c constraints.txt -e '.[preflight]'"
        )
    for job, rows in (("train", TRAIN), ("infer", INFER)):
        for size, topology, changes in rows:
            if args.only not in (None, size) or args.job not in (None, job):
                continue
            for model in MODELS[job]:
                if (job, model, size, topology) in map(key, lines):
                    continue
                lines += measure(job, model, size, topology, changes)
                lines.sort(key=place)
                # After every setting: the run may be stopped.
                output.write_text(
                    TEXT.format(compiler=compiler) + "\n".join([*HEAD, *lines]) + "\n"
                )


if __name__ == "__main__":
    main()
