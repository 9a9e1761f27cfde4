"""Makes the shipped checkpoints from nothing: one start, then GLIMMER, LUMEN and FiD, each from it.

    python -m experiments.train_pydocs [--seed=N] [--output=DIR] [--export=DIR] [--models=start,glimmer]
                                 [--initial=DIR]

About two hours on two idle CPU cores. A killed run resumes: finished stages are skipped, the others
continue at their last checkpoint. The start learns reading exercises alone, never a task; it has one
position table, so that a model of any cut can begin with it. Choices are made on dev, which is
evaluated after every stage of a model; test is read once, at the end of a model.

Files: `<output>/<stage>`, a run each; `<output>/record.json`, what each stage took and reached;
`<export>/pydocs_<model>.safetensors`, the learning curves beside them. What `pydocs_passages` and
`pydocs_retrieve` write into `data/pydocs` is needed, and made where it is missing.
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
# A stage's examples are its own: the run's seed counts in hundreds, the stages of a model in units.
SEEDS_PER_RUN = 100
# Of the first stage, one after another: the loss of an answer's first token stays at log 2, the choice
# between two passages, until within some hundred steps it falls, or it does not fall at all.
TRIES = 5
CHOOSES = 0.35  # nats; half of log 2


def lengths(passages: int) -> dict[str, Any]:
    """TASK_FEATURE_LENGTHS of that many passages; they hold 99 % of questions and gold passages."""
    return {"inputs": 48, "targets": 36, "passages": (passages, 120)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a chain; each begins with the parameters of the one before."""

    name: str
    number: int  # of its stream of examples; TRIES numbers from 0 on are the first stage's
    steps: int
    settings: dict[str, Any]


# The start: reading exercises on plain text, no task and no title of its own.
START_STAGES = (
    Stage("start1", 0, 900, {}),
    Stage(
        "start2",
        TRIES,
        1500,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_reading_2",
            "TASK_FEATURE_LENGTHS": lengths(5),
            "LEARNING_RATE": 0.01,
            **LINEAR,
        },
    ),
)
# Every model: first to read one passage, which costs a third, then to choose among three, then ten.
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
        TRIES + 1,
        4000,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed_gold",
            "TASK_FEATURE_LENGTHS": lengths(1),
            "LEARNING_RATE": 0.008,
            "SCHEDULE": "constant",
            "WARMUP_STEPS": 20,
        },
    ),
    Stage(
        "choose",
        TRIES + 2,
        2400,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed",
            "TASK_FEATURE_LENGTHS": lengths(3),
            "LEARNING_RATE": 0.008,
            **LINEAR,
        },
    ),
    Stage(
        "ten",
        TRIES + 3,
        200,
        {
            "MIXTURE_OR_TASK_NAME": "pydocs_renamed",
            "TASK_FEATURE_LENGTHS": lengths(10),
            "LEARNING_RATE": 0.002,
            **LINEAR,
        },
    ),
)
# Gin file and cut of each model while it trains. Supervised scores teach every cut to match: FiD and
# LUMEN have them on the layers that GLIMMER ranks with, and drop the head at the end. LUMEN's memory is
# the start's, frozen.
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glimmer": ("pydocs_glimmer_train", {}),
    "lumen": (
        "pydocs_glimmer_train",
        {"NUM_KEPT": None, "FREEZE_MEMORY": True, "SHARE_QUESTION_ENCODER": False},
    ),
    "fid": ("pydocs_start_train", {"ALPHA": 1.0, "BETA": 0.857, "MIMETIC_INIT": False}),
}
# GLIMMER keeps one passage when it answers. While it trains it keeps what it reads, up to three: an
# answer that nothing kept tells cannot be learnt.
KEPT = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not finished yet; stops at the first command that fails, with its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--seed", type=int, default=0, help="of parameters, examples and their order"
    )
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--export", type=Path, default=CHECKPOINTS, help="folder of the result")
    parser.add_argument(
        "--models", default=",".join((START, *CUTS)), help="what to make, separated by commas"
    )
    parser.add_argument(
        "--initial", type=Path, help="models begin with pydocs_<model>.safetensors of this folder"
    )
    args = parser.parse_args(argv)
    wanted = args.models.split(",")
    if unknown := sorted(set(wanted) - {START, *CUTS}):
        parser.error(f"--models: no {', '.join(unknown)}; there are {START}, {', '.join(CUTS)}")
    if not Path("data/pydocs/retrieved").is_dir():
        glimmer("passages", "pydocs_passages", OVERWRITE=True)
        glimmer("retrieve", "pydocs_retrieve")
    recipe = Recipe(args.seed, args.output, args.export, args.initial)
    if START in wanted:
        recipe.start()
    for model in CUTS:
        if model in wanted:
            recipe.model(model)
    recipe.plot()


class Recipe:
    """The chain of runs of one seed, and its record."""

    def __init__(self, seed: int, output: Path, export: Path, initial: Path | None):
        """Raises SystemExit where `output` holds the runs of another seed or beginning."""
        self._seed, self._output, self._export, self._initial = seed, output, export, initial
        self._path = output / "record.json"
        begun = {"seed": seed, "initial": str(initial) if initial else None}
        self._record: dict[str, Any] = {**begun, "stages": {}}
        if self._path.is_file():
            self._record = json.loads(self._path.read_text(encoding="utf-8"))
            found = {name: self._record[name] for name in begun}
            if found != begun:
                raise SystemExit(
                    f"--output: {output} holds the runs of {found}, and {begun} was asked for. Choose "
                    "another folder, or the settings of those runs."
                )

    def start(self) -> Path:
        """The start's last run, exported as `pydocs_start`."""
        before: Path | None = None
        for stage in START_STAGES:
            before = self._first(stage) if before is None else self._begin_with(before, stage)
        assert before is not None
        self._save(START, before)
        return before

    def model(self, model: str) -> None:
        """All stages of a model; dev after each, test after the last, then the export.

        Raises:
          SystemExit: the parameters that it begins with are missing.
        """
        gin_file, cut = CUTS[model]
        run = self._start_of(model)
        for stage in MODEL_STAGES:
            passages = stage.settings["TASK_FEATURE_LENGTHS"]["passages"][0]
            kept = {"NUM_KEPT": min(KEPT, passages)} if model == "glimmer" else {}
            settings = {**TASK, **stage.settings, **cut, **kept, "INITIAL_CHECKPOINT_PATH": run}
            run = self._output / f"{model}_{stage.name}"
            self._train(run.name, gin_file, stage, self._stream(stage), settings)
            self._evaluate(model, run, "validation", "dev")
        self._evaluate(model, run, "test", "test")
        self._save(model, run)

    def plot(self) -> None:
        """Learning curves of what is finished, beside the exported files."""
        curves: dict[str, list[dict[str, float]]] = {}
        for name, stage in self._record["stages"].items():
            if not stage.get("chooses", True):
                continue
            rows = curves.setdefault(name.partition("_")[0], [])
            first = rows[-1]["step"] if rows else 0
            found = metrics(self._output / name)
            rows += [{**row, "step": row["step"] + first} for row in found]
        if curves:
            plot(curves, self._export / "learning_curves.png")

    def _start_of(self, model: str) -> Path:
        folder, name = (self._export, START) if self._initial is None else (self._initial, model)
        path = folder / f"pydocs_{name}.safetensors"
        if not path.is_file():
            raise SystemExit(
                f"{path}: expected the parameters that {model} begins with, found no file. Make them "
                f"with --models={START}, or give --initial a folder that has them."
            )
        return path

    def _stream(self, stage: Stage, attempt: int = 0) -> int:
        return SEEDS_PER_RUN * self._seed + stage.number + attempt

    def _first(self, stage: Stage) -> Path:
        """The run of the first attempt whose model has learnt to choose.

        Raises:
          SystemExit: none has.
        """
        for attempt in range(TRIES):
            run = self._output / f"{START}_{stage.name}_{attempt}"
            # On two devices, by chance or not, no run has learnt to choose.
            settings = {**stage.settings, "MIMETIC_INIT": True, "devices": 1}
            seed = self._stream(stage, attempt)
            self._train(run.name, "pydocs_start_train", stage, seed, settings)
            loss = metrics(run)[-1]["train/first_token"]
            self._note(run.name, chooses=loss < CHOOSES)
            if loss < CHOOSES:
                return run
        raise SystemExit(
            f"None of {TRIES} attempts learnt to choose in {stage.steps} steps: the loss of the first "
            f"token stayed above {CHOOSES} nats. Take another --seed and --output."
        )

    def _begin_with(self, before: Path, stage: Stage) -> Path:
        run = self._output / f"{START}_{stage.name}"
        settings = {**stage.settings, "INITIAL_CHECKPOINT_PATH": before}
        self._train(run.name, "pydocs_start_train", stage, self._stream(stage), settings)
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
        # Of all its restarts together, compilation included.
        seconds = round(metrics(run)[-1]["train/alive_seconds"])
        self._note(name, steps=stage.steps, seed=seed, seconds=seconds)

    def _evaluate(self, model: str, run: Path, split: str, short: str) -> None:
        """Metrics of all questions of a split, into the record."""
        if short in self._record["stages"][run.name]:
            return
        output = self._output / f"{run.name}_{short}"
        glimmer(
            "eval",
            f"pydocs_{model}_eval",
            CHECKPOINT_PATH=run,
            MIXTURE_OR_TASK_SPLIT=split,
            EVAL_OUTPUT_DIR=output,
        )
        found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        right = {k: round(v, 4) for k, v in found.items() if k.startswith("pydocs_") or k == "mean"}
        self._note(run.name, **{short: right})

    def _note(self, name: str, **facts: Any) -> None:
        self._record["stages"].setdefault(name, {}).update(facts)
        text = json.dumps(self._record, indent=2) + "\n"
        write_file(open_folder(self._output), self._path.name, text.encode())

    def _save(self, model: str, run: Path) -> None:
        path = self._export / f"pydocs_{model}.safetensors"
        self._export.mkdir(parents=True, exist_ok=True)
        glimmer("export", f"pydocs_{model}_export", CHECKPOINT_PATH=run, OUTPUT_PATH=path)


def metrics(run: Path) -> list[dict[str, float]]:
    """What a run logged while training, a dictionary for each line of its metrics.jsonl."""
    text = (run / "train" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Loss per answer token and recall at 1 of each chain, over its steps."""
    import matplotlib

    matplotlib.use("Agg")  # a file, on machines without a screen too
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
