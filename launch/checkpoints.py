"""Makes the shipped checkpoints again: one start, then FiD, LUMEN and GLIMMER fine-tuned from it apart.

    python -m launch.checkpoints [--output=DIR]

More than an hour on two CPU cores; a killed run goes on where it was. Its first stage is tried
with one seed after another until the model chooses among passages, which not every seed learns. Needs
what `pydocs_passages` and `pydocs_retrieve` write into `data/pydocs`, and makes it where it is missing.
Writes `glimmer_jax/checkpoints/pydocs_<model>.safetensors`, and the learning curves beside them.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glimmer_jax.shipped import CHECKPOINTS
from launch.command import glimmer

LINEAR = {"SCHEDULE": "linear", "WARMUP_STEPS": 20}
RENAMED = {
    "MIXTURE_OR_TASK_NAME": "pydocs_renamed",
    "MIXTURE_OR_TASK_MODULE": "tasks.pydocs",
    "DATA_DIR": "data/pydocs/retrieved",
    "LEARNING_RATE": 0.01,
    **LINEAR,
}


def lengths(passages: int) -> dict[str, Any]:
    return {"inputs": 36, "targets": 32, "passages": (passages, 80)}


# The first stage, with one seed after another: the loss of an answer's first token stays at log 2, the
# choice between two passages, until within some hundred steps it falls, or it does not fall at all.
FIRST = {"TRAIN_STEPS": 900}
SEEDS = range(5)
CHOOSES = 0.35  # nats; half of log 2
# Name of a later stage of the start -> what it changes in gin/examples/pydocs_start_train.gin.
STAGES: dict[str, dict[str, Any]] = {
    "start2": {**RENAMED, "TRAIN_STEPS": 600, "TASK_FEATURE_LENGTHS": lengths(6)},
    # Titles alone, and few passages, so that it is quick: copying takes the most practice.
    "start3": {
        **RENAMED,
        "TRAIN_STEPS": 2000,
        "MIXTURE_OR_TASK_NAME": "pydocs_which_function_renamed",
        "TASK_FEATURE_LENGTHS": lengths(3),
    },
    # All tasks again, before each model goes its own way.
    "start4": {
        **RENAMED,
        "TRAIN_STEPS": 700,
        "LEARNING_RATE": 0.006,
        "TASK_FEATURE_LENGTHS": lengths(5),
    },
}
# The same for all three: examples and steps, on all ten passages that questions come with.
FINETUNE = {
    "TRAIN_STEPS": 300,
    "WARMUP_STEPS": 20,
    "LOG_EVERY": 25,
    "TASK_FEATURE_LENGTHS": lengths(10),
}
# GLIMMER has the cut of the start, and forgets what it can at a higher rate. The others learn theirs.
RATES = {"glimmer": 0.001, "lumen": 0.005, "fid": 0.005}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not finished yet; stops at the first command that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_args(argv)
    # As the first stage of the shipped ones: on two, by chance or not, no run has learnt to choose.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    if not Path("data/pydocs/retrieved").is_dir():
        glimmer("passages", "pydocs_passages", OVERWRITE=True)
        glimmer("retrieve", "pydocs_retrieve")
    chain = [first_stage(args.output)]
    for name, changes in STAGES.items():
        chain.append(args.output / name)
        start = {"INITIAL_CHECKPOINT_PATH": chain[-2]}
        glimmer("train", "pydocs_start_train", MODEL_DIR=chain[-1], **start, **changes)
    for name, rate in RATES.items():
        run, start = args.output / name, {"INITIAL_CHECKPOINT_PATH": chain[-1]}
        own = {**start, "LEARNING_RATE": rate}
        glimmer("train", f"pydocs_{name}_train", MODEL_DIR=run, **own, **FINETUNE)
        shipped = CHECKPOINTS / f"pydocs_{name}.safetensors"
        glimmer("export", f"pydocs_{name}_export", CHECKPOINT_PATH=run, OUTPUT_PATH=shipped)
    start_curves = {run.name: metrics(run) for run in chain}
    curves = {name: metrics(args.output / name) for name in RATES}
    plot(start_curves, curves, CHECKPOINTS / "learning_curves.png")


def first_stage(output: Path) -> Path:
    """The run of the first seed whose model has learnt to choose.

    Raises:
      SystemExit: none has, or a command failed.
    """
    for seed in SEEDS:
        run = output / f"start1_seed{seed}"
        glimmer("train", "pydocs_start_train", MODEL_DIR=run, SEED=seed, **FIRST)
        if metrics(run)[-1]["train/first_token"] < CHOOSES:
            return run
    raise SystemExit(
        f"None of {len(SEEDS)} seeds learnt to choose in {FIRST['TRAIN_STEPS']} steps."
    )


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run logged while training, a dictionary for each line of its metrics.jsonl."""
    text = (run / "train" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def plot(
    start: dict[str, list[dict[str, float]]],
    models: dict[str, list[dict[str, float]]],
    path: Path,
) -> None:
    """Loss of an answer token and recall at 1: the start's stages in a row, then the models at once."""
    import matplotlib

    matplotlib.use("Agg")  # a file, on machines without a screen too
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    first = 0
    for name, rows in [*start.items(), *models.items()]:
        for pane, key in zip(panes, ("train/cross_entropy", "train/recall_at_1"), strict=True):
            points = [(first + row["step"], row[key]) for row in rows if key in row]
            # FiD and LUMEN score nothing: their recall is the retriever's.
            if points and not (key.endswith("recall_at_1") and name in ("fid", "lumen")):
                pane.plot(*zip(*points, strict=True), label=name)
        if name in start:
            first += int(rows[-1]["step"])
    panes[0].set(xlabel="step", ylabel="cross-entropy of an answer token, nats", ylim=(0, 3))
    panes[1].set(xlabel="step", ylabel="recall at 1 on its own training questions", ylim=(0, 1))
    for pane in panes:
        pane.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
