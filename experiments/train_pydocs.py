"""Trains the shipped checkpoints from scratch: a common start, from which each model is trained.

    python -m experiments.train_pydocs [--seed=N] [--output=DIR] [--export=DIR]
                                       [--models=start,glimmer] [--initial=DIR]

Hours on two CPU cores. A killed run resumes: finished stages are skipped, the others resume at their
last checkpoint. The start learns only reading exercises, no task; it has one position table, so it
can be recut into any model. Dev is evaluated after each stage of a model that reads several
passages; test is evaluated once per model, at the end.

    <output>/<stage>                         run of a stage
    <output>/record.json                     duration and results of each stage
    <export>/pydocs_<model>.safetensors      trained parameters
    <export>/learning_curves.png

Passages and retrieved files are read from `data/pydocs`, and written first if they are missing.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.command import glimmer
from glimmer_jax.shipped import CHECKPOINTS
from glimmer_jax.storage.folder import open_folder, write_file

LINEAR = {"SCHEDULE": "linear", "WARMUP_STEPS": 20}
START = "start"
# Each stage has its own stream of examples: the run's seed times 100, plus the number of the stage.
SEEDS_PER_RUN = 100
# Maximum number of attempts of the first stage. The loss of an answer's first token stays at log 2,
# a random choice between two passages; within some hundred steps it either falls or never does.
MAX_ATTEMPTS = 5
MAX_CHOICE_LOSS = 0.35  # nats; half of log 2


# TASK_FEATURE_LENGTHS of all evaluations and of the last stage. Renamed questions are shorter.
LENGTHS: dict[str, Any] = {"inputs": 48, "targets": 36, "passages": (10, 120)}


def short_lengths(passages: int) -> dict[str, Any]:
    """Lengths for K passages that 99 % of renamed questions, answers and gold passages fit into."""
    return {"inputs": 40, "targets": 28, "passages": (passages, 112)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a chain; it starts from the parameters of the previous stage."""

    name: str
    number: int  # of its stream of examples; the first stage uses 0 to MAX_ATTEMPTS - 1
    steps: int
    settings: dict[str, Any]


# The start: reading exercises on plain text.
START_STAGES = (
    Stage("start1", 0, 900, {}),
    Stage(
        "start2",
        MAX_ATTEMPTS,
        1500,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_reading_2",
            # 95 % of the exercises' passages fit.
            "TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 28, "passages": (5, 88)},
            "LEARNING_RATE": 0.01,
            **LINEAR,
        },
    ),
)
# All models first learn to read one passage, at a third of the cost, then to choose among three,
# then ten.
TASK = {
    "MIXTURE_OR_TASK_MODULE": "tasks.pydocs",
    "DATA_DIR": "data/pydocs/retrieved",
    "DISTILLATION_WEIGHT": 0.0,
    "SUPERVISED_WEIGHT": 1.0,
    "LOG_EVERY": 50,
    "CHECKPOINT_EVERY": 100,
}
MODEL_STAGES = (
    Stage(
        "read",
        MAX_ATTEMPTS + 1,
        4000,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed_gold",
            "TASK_FEATURE_LENGTHS": short_lengths(1),
            "LEARNING_RATE": 0.008,
            "SCHEDULE": "constant",
            "WARMUP_STEPS": 20,
        },
    ),
    Stage(
        "choose",
        MAX_ATTEMPTS + 2,
        2400,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed",
            "TASK_FEATURE_LENGTHS": short_lengths(3),
            "LEARNING_RATE": 0.008,
            **LINEAR,
        },
    ),
    Stage(
        "titles",
        MAX_ATTEMPTS + 3,
        2200,
        {
            # Which function, whose answers are the longest, every second time.
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed_titles",
            "TASK_FEATURE_LENGTHS": short_lengths(3),
            "LEARNING_RATE": 0.006,
            **LINEAR,
        },
    ),
    Stage(
        "ten",
        MAX_ATTEMPTS + 4,
        200,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed",
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "LEARNING_RATE": 0.002,
            **LINEAR,
        },
    ),
)
# Gin file and cut of each model during training. Supervised scores teach every cut to match: FiD
# and LUMEN have them on GLIMMER's reranking layers, and drop the scoring head at the end. LUMEN's
# memory encoder is that of the start, frozen.
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glimmer": ("examples/pydocs_glimmer_train", {}),
    "lumen": (
        "examples/pydocs_glimmer_train",
        {"NUM_KEPT": None, "FREEZE_MEMORY": True, "SHARE_QUESTION_ENCODER": False},
    ),
    "fid": ("examples/pydocs_start_train", {"ALPHA": 1.0, "BETA": 0.857, "MIMETIC_INIT": False}),
}
# The cut in which each model answers.
USED: dict[str, dict[str, Any]] = {
    "glimmer": {"ALPHA": 0.43, "BETA": 0.67, "NUM_KEPT": 1},
    "lumen": {"ALPHA": 0.43},
    "fid": {},
}
# GLIMMER keeps one passage when it answers. During training it keeps up to three, because it cannot
# learn an answer that is in no kept passage.
KEPT = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all unfinished stages. Exits at the first failing command, with its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--seed", type=int, default=0, help="of parameters, examples and their order"
    )
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--export", type=Path, default=CHECKPOINTS, help="folder of the result")
    parser.add_argument(
        "--models", default=",".join((START, *CUTS)), help="models to train, separated by commas"
    )
    parser.add_argument(
        "--initial", type=Path, help="folder whose pydocs_<model>.safetensors the models start from"
    )
    args = parser.parse_args(argv)
    selected = args.models.split(",")
    if unknown := sorted(set(selected) - {START, *CUTS}):
        parser.error(
            f"--models must be among {START}, {', '.join(CUTS)}, got {', '.join(unknown)}."
        )
    write_data()
    training = Training(args.seed, args.output, args.export, args.initial)
    if START in selected:
        training.start()
    for model in CUTS:
        if model in selected:
            training.model(model)
    training.plot()


def write_data() -> None:
    """Writes passages and retrieved files into `data/pydocs`, if they are missing."""
    if not Path("data/pydocs/retrieved").is_dir():
        glimmer("passages", "examples/pydocs_passages", OVERWRITE=True)
        glimmer("retrieve", "examples/pydocs_retrieve")


class Training:
    """The chain of runs of one seed, and its record."""

    def __init__(self, seed: int, output: Path, export: Path, initial: Path | None):
        """Raises SystemExit if `output` holds runs of another seed or other initial parameters."""
        self._seed, self._output, self._export, self._initial = seed, output, export, initial
        self._path = output / "record.json"
        settings = {"seed": seed, "initial": str(initial) if initial else None}
        self._record: dict[str, Any] = {**settings, "stages": {}}
        if self._path.is_file():
            self._record = json.loads(self._path.read_text(encoding="utf-8"))
            recorded = {name: self._record[name] for name in settings}
            if recorded != settings:
                raise SystemExit(
                    f"--output: {output} holds the runs of {recorded}, got {settings}. Choose another "
                    "folder, or the settings of those runs."
                )

    def start(self) -> Path:
        """Trains and exports `pydocs_start`; returns the folder of its last run."""
        previous: Path | None = None
        for stage in START_STAGES:
            previous = self._first(stage) if previous is None else self._next(previous, stage)
        assert previous is not None
        self._save(START, previous)
        return previous

    def model(self, model: str) -> None:
        """Trains a model: all stages, those that choose passages evaluated on dev, the last on test.

        Then exports it.

        Raises:
          SystemExit: the initial parameters are missing.
        """
        gin_file, cut = CUTS[model]
        run = self._start_of(model)
        for stage in MODEL_STAGES:
            passages = stage.settings["TASK_FEATURE_LENGTHS"]["passages"][0]
            kept = {"NUM_KEPT": min(KEPT, passages)} if model == "glimmer" else {}
            settings = {**TASK, **stage.settings, **cut, **kept, "INITIAL_CHECKPOINT_PATH": run}
            run = self._output / f"{model}_{stage.name}"
            self._train(run.name, gin_file, stage, self._stream(stage), settings)
            # One passage leaves nothing to rerank: the scores drift, until the next stage.
            if passages > 1:
                self._evaluate(model, run, "validation", "dev")
        self._evaluate(model, run, "test", "test")
        self._save(model, run)

    def plot(self) -> None:
        """Plots the learning curves of finished stages."""
        curves: dict[str, list[dict[str, float]]] = {}
        for name, stage in self._record["stages"].items():
            if not stage.get("chooses", True):
                continue
            rows = curves.setdefault(name.partition("_")[0], [])
            first = rows[-1]["step"] if rows else 0
            logged = metrics(self._output / name)
            rows += [{**row, "step": row["step"] + first} for row in logged]
        if curves:
            plot(curves, self._export / "learning_curves.png")

    def _start_of(self, model: str) -> Path:
        folder, name = (self._export, START) if self._initial is None else (self._initial, model)
        path = folder / f"pydocs_{name}.safetensors"
        if not path.is_file():
            raise SystemExit(
                f"{path}: expected the initial parameters of {model}, found no file. Train them with "
                f"--models={START}, or set --initial to a folder that has them."
            )
        return path

    def _stream(self, stage: Stage, attempt: int = 0) -> int:
        return SEEDS_PER_RUN * self._seed + stage.number + attempt

    def _first(self, stage: Stage) -> Path:
        """The run of the first attempt whose model learned to choose a passage.

        Raises:
          SystemExit: no attempt did.
        """
        for attempt in range(MAX_ATTEMPTS):
            run = self._output / f"{START}_{stage.name}_{attempt}"
            # With two devices no run has learned to choose, possibly by chance.
            settings = {**stage.settings, "MIMETIC_INIT": True, "devices": 1}
            seed = self._stream(stage, attempt)
            self._train(run.name, "examples/pydocs_start_train", stage, seed, settings)
            loss = metrics(run)[-1]["train/first_token"]
            self._note(run.name, chooses=loss < MAX_CHOICE_LOSS)
            if loss < MAX_CHOICE_LOSS:
                return run
        raise SystemExit(
            f"None of {MAX_ATTEMPTS} attempts learned to choose a passage in {stage.steps} steps: the "
            f"loss of the first token stayed above {MAX_CHOICE_LOSS} nats. Use another --seed and "
            "--output."
        )

    def _next(self, previous: Path, stage: Stage) -> Path:
        run = self._output / f"{START}_{stage.name}"
        settings = {**stage.settings, "INITIAL_CHECKPOINT_PATH": previous}
        self._train(run.name, "examples/pydocs_start_train", stage, self._stream(stage), settings)
        return run

    def _train(
        self, name: str, gin_file: str, stage: Stage, seed: int, settings: dict[str, Any]
    ) -> None:
        if name in self._record["stages"]:
            return
        run = self._output / name
        glimmer(
            "train", gin_file, MODEL_DIR=run, TRAIN_STEPS=stage.steps, RANDOM_SEED=seed, **settings
        )
        # Includes compilation and all restarts.
        seconds = round(metrics(run)[-1]["train/alive_seconds"])
        self._note(name, steps=stage.steps, seed=seed, seconds=seconds)

    def _evaluate(self, model: str, run: Path, split: str, short: str) -> None:
        """Evaluates all questions of a split and records the metrics."""
        if short in self._record["stages"][run.name]:
            return
        output = self._output / f"{run.name}_{short}"
        glimmer(
            "eval",
            "examples/pydocs_eval",
            "sizes/tiny",
            f"models/{model}",
            **USED[model],
            CHECKPOINT_PATH=run,
            TASK_FEATURE_LENGTHS=LENGTHS,
            MIXTURE_OR_TASK_SPLIT=split,
            EVAL_OUTPUT_DIR=output,
        )
        values = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        chosen = {
            name: round(value, 4)
            for name, value in values.items()
            if name.startswith("pydocs_") or name == "mean"
        }
        self._note(run.name, **{short: chosen})

    def _note(self, name: str, **facts: Any) -> None:
        self._record["stages"].setdefault(name, {}).update(facts)
        text = json.dumps(self._record, indent=2) + "\n"
        write_file(open_folder(self._output), self._path.name, text.encode())

    def _save(self, model: str, run: Path) -> None:
        path = self._export / f"pydocs_{model}.safetensors"
        self._export.mkdir(parents=True, exist_ok=True)
        # The start is exported as it was trained.
        files = () if model == START else ("sizes/tiny", f"models/{model}")
        cut = USED.get(model, {})
        places = {"CHECKPOINT_PATH": run, "OUTPUT_PATH": path, "OVERWRITE": True}
        glimmer("export", "runs/export", *files, **cut, **places)
        # The package has the built-in vocabulary already.
        path.with_suffix(".spiece.model").unlink(missing_ok=True)


def metrics(run: Path) -> list[dict[str, float]]:
    """The training metrics that a run logged: one dictionary per line of its metrics.jsonl."""
    text = (run / "train" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plots loss per answer token and recall at 1 of each chain over its steps."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, rows in curves.items():
        for pane, key in zip(panes, ("train/cross_entropy", "train/recall_at_1"), strict=True):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                pane.plot(*zip(*points, strict=True), label=name)
    panes[0].set(xlabel="step", ylabel="cross-entropy per answer token, nats", ylim=(0, 3))
    panes[1].set(xlabel="step", ylabel="recall at 1 on its own training questions", ylim=(0, 1))
    for pane in panes:
        pane.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
