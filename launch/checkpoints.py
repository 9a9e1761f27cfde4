"""Makes the shipped checkpoints again: one start, then FiD, LUMEN and GLIMMER fine-tuned from it apart.

    python -m launch.checkpoints [--output=DIR]

More than an hour on two CPU cores; a killed run goes on where it was. Its first stage is tried
with one seed after another until the model chooses among passages, which not every seed learns. Needs
what `pydocs_passages` and `pydocs_retrieve` write into `data/pydocs`, and makes it where it is missing.
Writes `glimmer_jax/checkpoints/pydocs_<model>.safetensors`, and the learning curves beside them.
"""

import argparse
import json
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
# From the start's end each model goes its own way, over the same examples in as many steps. First it
# practises its own cut with supervised scores, from which it learns to match: FiD and LUMEN, which use
# no scores, put the head off afterwards.
PRACTICE: dict[str, Any] = {**RENAMED, "TRAIN_STEPS": 600, "TASK_FEATURE_LENGTHS": lengths(5)}
CUTS: dict[str, dict[str, Any]] = {
    "glimmer": {"LEARNING_RATE": 0.006},
    # The start had GLIMMER's cut, where six of seven layers see memory or score as well.
    "fid": {"ALPHA": 1.0, "BETA": 0.857},
    "lumen": {"FREEZE_MEMORY": True, "SHARE_QUESTION_ENCODER": False, "LEARNING_RATE": 0.003},
}
# Then its own loss, on all ten passages that questions come with.
FINETUNE = {
    "TRAIN_STEPS": 300,
    "WARMUP_STEPS": 20,
    "LEARNING_RATE": 0.001,
    "LOG_EVERY": 25,
    "TASK_FEATURE_LENGTHS": lengths(10),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not finished yet; stops at the first command that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    args = parser.parse_args(argv)
    if not Path("data/pydocs/retrieved").is_dir():
        glimmer("passages", "pydocs_passages", OVERWRITE=True)
        glimmer("retrieve", "pydocs_retrieve")
    chain = [first_stage(args.output)]
    for name, changes in STAGES.items():
        chain.append(args.output / name)
        own = {**changes, "INITIAL_CHECKPOINT_PATH": chain[-2]}
        glimmer("train", "pydocs_start_train", MODEL_DIR=chain[-1], **own)
    for name, cut in CUTS.items():
        practice, run = args.output / f"{name}_practice", args.output / name
        own = {**PRACTICE, **cut, "INITIAL_CHECKPOINT_PATH": chain[-1]}
        glimmer("train", "pydocs_start_train", MODEL_DIR=practice, **own)
        own = {**FINETUNE, "INITIAL_CHECKPOINT_PATH": practice}
        glimmer("train", f"pydocs_{name}_train", MODEL_DIR=run, **own)
        shipped = CHECKPOINTS / f"pydocs_{name}.safetensors"
        glimmer("export", f"pydocs_{name}_export", CHECKPOINT_PATH=run, OUTPUT_PATH=shipped)
    start_curves = {run.name: metrics(run) for run in chain}
    curves = {name: after(args.output, name) for name in CUTS}
    plot(start_curves, curves, CHECKPOINTS / "learning_curves.png")


def first_stage(output: Path) -> Path:
    """The run of the first seed whose model has learnt to choose.

    Raises:
      SystemExit: none has, or a command failed.
    """
    for seed in SEEDS:
        run = output / f"start1_seed{seed}"
        # On two devices, by chance or not, no run has learnt to choose.
        glimmer("train", "pydocs_start_train", devices=1, MODEL_DIR=run, SEED=seed, **FIRST)
        if metrics(run)[-1]["train/first_token"] < CHOOSES:
            return run
    raise SystemExit(
        f"None of {len(SEEDS)} seeds learnt to choose in {FIRST['TRAIN_STEPS']} steps."
    )


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run logged while training, a dictionary for each line of its metrics.jsonl."""
    text = (run / "train" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def after(output: Path, name: str) -> list[dict[str, float]]:
    """What a model logged after the start: practice, then fine-tuning, in one count of steps."""
    practice, own = metrics(output / f"{name}_practice"), metrics(output / name)
    if name != "glimmer":  # It scores nothing now: recall is the retriever's.
        own = [{key: row[key] for key in row if key != "train/recall_at_1"} for row in own]
    return [*practice, *({**row, "step": row["step"] + PRACTICE["TRAIN_STEPS"]} for row in own)]


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
