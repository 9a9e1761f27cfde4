"""Quality of the fast modes of a CPU on the built-in tasks.

    python -m benchmarks.fast_modes --json OUT.json --checkpoint NAME=PATH [--checkpoint NAME=PATH ...]
                                    [--data DIR] [--num_examples N]

Each checkpoint answers the same held-out questions twice: in float32, and with the operands of
projections in bfloat16. All are compared with the first one in float32. Intervals are paired and
resample pages.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.questions import Questions, compare, interval, write_data
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import parameters
from glimmer_jax.weights.load import load

DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--data", type=Path, default=Path("data/pydocs"), metavar="DIR")
    parser.add_argument("--num_examples", type=int, default=500, help="test questions of each task")
    args = parser.parse_args(argv)
    write_data(args.data)
    passages = Passages.open(args.data / "passages")
    questions = Questions(args.data, args.num_examples)
    rows, baseline = [], None
    for name, path in (pair.split("=", 1) for pair in args.checkpoint):
        for dtype in DTYPES:
            model, params = read_model(path, dtype)
            results = questions.ask(model, params, passages)
            baseline = baseline or results
            rows.append({"system": name, "operands": dtype, **compare(results, baseline)})
            print(json.dumps(rows[-1]), flush=True)
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def read_model(path: str, dtype: str) -> tuple[GlimmerModel, Any]:
    """The checkpoint's model without dropout, with `dtype` for the operands of projections."""
    loaded = load(path)
    config = loaded.answering_config()
    operands = None if dtype == "float32" else dtype
    t5 = dataclasses.replace(config.t5, dtype="float32", matmul_dtype=operands)
    model = GlimmerModel(dataclasses.replace(config, t5=t5))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    fitted = parameters.fit(loaded, path, model, Vocabulary("pydocs").fingerprint)
    return model, parameters.place(fitted, model, mesh)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        f"n = {rows[0]['exact_match']['n']} questions",
        "| system | operands | exact match | vs. first | nats per token | vs. first |",
        "|" + "---|" * 6,
    ]
    lines += [
        f"| {row['system']} | {row['operands']} | {interval(row['exact_match'])} | "
        f"{interval(row['nats_per_token'])} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
