"""Latency of a question: PyTorch's T5 used as FiD, and our FiD, LUMEN and GLIMMER, in one run.

    python -m benchmarks.question_latency --json latency.json

T5-base, one question of 32 tokens with 10, 20 and 40 passages of 224 tokens, 16 answer tokens, greedy,
two threads, random weights. On a GPU only bfloat16 is measured. Every system and dtype runs in its
own process; `timing` interleaves them.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.setting import DTYPES, SYSTEMS, Setting
from benchmarks.table import render
from benchmarks.timing import Worker, measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all systems, writes the rows as JSON, and prints the tables."""
    args = _parse(arguments)
    setting = Setting(
        args.size,
        args.question,
        args.passage,
        args.answer,
        tuple(args.passages),
        args.kept,
        args.threads,
    )
    dtypes = args.dtypes or _default_dtypes()
    workers: list[Worker] = []
    rows = []
    try:
        for system in args.systems:
            for dtype in dtypes:
                print(f"starting {system} in {dtype}", flush=True)
                workers.append(Worker(system, dtype, setting))
        for passages in setting.passages:
            rows += measure(workers, passages, args.runs, lambda line: print(line, flush=True))
            # After each size, so that an interrupted run keeps its results.
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(render(rows), flush=True)
    finally:
        for worker in workers:
            worker.close()


def _default_dtypes() -> Sequence[str]:
    # In another process, so that this one does not occupy the device.
    code = "import jax; print(jax.default_backend())"
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return DTYPES if result.stdout.strip() == "cpu" else ("bfloat16",)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = Setting()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.question_latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", type=pathlib.Path, required=True, help="output")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: both; a GPU: bfloat16"
    )
    parser.add_argument("--runs", type=int, default=5, help="undisturbed runs per row")
    parser.add_argument("--size", default=default.size, help="base, or tiny for tests")
    parser.add_argument("--question", type=int, default=default.question, help="tokens")
    parser.add_argument("--passage", type=int, default=default.passage, help="tokens")
    parser.add_argument("--answer", type=int, default=default.answer, help="tokens")
    parser.add_argument("--passages", type=int, nargs="+", default=default.passages)
    parser.add_argument(
        "--kept", type=int, default=default.kept, help="passages that GLIMMER keeps"
    )
    parser.add_argument("--threads", type=int, default=default.threads)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
