"""Makes the shipped checkpoints again: one start, then FiD, LUMEN and GLIMMER fine-tuned from it apart.

    python -m experiments.train_pydocs [--output=DIR]

More than an hour on two CPU cores; a killed run goes on where it was. Its first stage is tried
with one seed after another until the model chooses among passages, which not every seed learns. Needs
what `pydocs_passages` and `pydocs_retrieve` write into `data/pydocs`, and makes it where it is missing.
Writes `glimmer_jax/checkpoints/pydocs_<model>.safetensors`, and the learning curves beside them.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.command import glimmer
from glimmer_jax.shipped import CHECKPOINTS

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
SEEDS = (1, 0, 2, 3, 4)  # 1 has learnt it wherever it was tried
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
# From the start's end each model goes its own way, over the same examples in as many steps. First all ten
# passages that questions come with, by each model's own loss.
FINETUNE = {
    "TRAIN_STEPS": 300,
    "WARMUP_STEPS": 20,
    "LOG_EVERY": 25,
    "TASK_FEATURE_LENGTHS": lengths(10),
}
# Then five, twice, with supervised scores, from which a cut learns to match. FiD and LUMEN, which use no
# scores, put the head off at the end. Memory stays frozen for LUMEN.
PRACTICE: dict[str, Any] = {
    **RENAMED,
    "LOG_EVERY": 25,
    "TASK_FEATURE_LENGTHS": lengths(5),
}
PRACTICE_STEPS = (600, 500)
FROZEN = {"FREEZE_MEMORY": True, "SHARE_QUESTION_ENCODER": False}


@dataclasses.dataclass(frozen=True)
class Own:
    """How a model goes on from the start."""

    rates: tuple[float, float, float]  # of its fine-tuning, and of each practice
    gin_file: str  # of its practice
    cut: dict[str, Any]  # in that file


# The start had GLIMMER's cut, which forgets least at a lower rate; FiD's is the furthest from it.
MODELS = {
    "glimmer": Own((0.001, 0.006, 0.006), "pydocs_glimmer_train", {"NUM_KEPT": 3}),
    "lumen": Own(
        (0.005, 0.003, 0.003),
        "pydocs_glimmer_train",
        {"NUM_KEPT": None, "DISTILLATION_WEIGHT": 0.0, **FROZEN},
    ),
    "fid": Own((0.005, 0.01, 0.006), "pydocs_start_train", {"ALPHA": 1.0, "BETA": 0.857}),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not finished yet; stops at the first command that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_args(argv)
    if not Path("data/pydocs/retrieved").is_dir():
        glimmer("passages", "pydocs_passages", OVERWRITE=True)
        glimmer("retrieve", "pydocs_retrieve")
    curves: dict[str, list[dict[str, float]]] = {}
    chain = [first_stage(args.output)]
    for name, changes in STAGES.items():
        chain.append(args.output / name)
        given = {**changes, "INITIAL_CHECKPOINT_PATH": chain[-2]}
        glimmer("train", "pydocs_start_train", MODEL_DIR=chain[-1], **given)
    for name, own in MODELS.items():
        runs = [args.output / name]
        given = {**FINETUNE, "LEARNING_RATE": own.rates[0], "INITIAL_CHECKPOINT_PATH": chain[-1]}
        glimmer("train", f"pydocs_{name}_train", MODEL_DIR=runs[0], **given)
        for steps, rate in zip(PRACTICE_STEPS, own.rates[1:], strict=True):
            given = {**PRACTICE, **own.cut, "TRAIN_STEPS": steps, "LEARNING_RATE": rate}
            given["INITIAL_CHECKPOINT_PATH"] = runs[-1]
            runs.append(args.output / f"{name}_practice{len(runs)}")
            glimmer("train", own.gin_file, MODEL_DIR=runs[-1], **given)
        shipped = CHECKPOINTS / f"pydocs_{name}.safetensors"
        glimmer("export", f"pydocs_{name}_export", CHECKPOINT_PATH=runs[-1], OUTPUT_PATH=shipped)
        curves[name] = in_a_row(runs)
    start_curves = {run.name: metrics(run) for run in chain}
    plot(start_curves, curves, CHECKPOINTS / "learning_curves.png")


def first_stage(output: Path) -> Path:
    """The run of the first seed whose model has learnt to choose.

    Raises:
      SystemExit: none has, or a command failed.
    """
    for seed in SEEDS:
        run = output / f"start1_seed{seed}"
        # On two devices, by chance or not, no run has learnt to choose.
        glimmer("train", "pydocs_start_train", devices=1, MODEL_DIR=run, RANDOM_SEED=seed, **FIRST)
        if metrics(run)[-1]["train/first_token"] < CHOOSES:
            return run
    raise SystemExit(
        f"None of {len(SEEDS)} seeds learnt to choose in {FIRST['TRAIN_STEPS']} steps."
    )


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run logged while training, a dictionary for each line of its metrics.jsonl."""
    text = (run / "train" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def in_a_row(runs: Sequence[Path]) -> list[dict[str, float]]:
    """What runs logged, one after another, in one count of steps."""
    rows: list[dict[str, float]] = []
    for run in runs:
        first = rows[-1]["step"] if rows else 0
        rows += [{**row, "step": row["step"] + first} for row in metrics(run)]
    return rows


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
            if points:
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
