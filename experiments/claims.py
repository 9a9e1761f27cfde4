"""Runs the experiments on the paper's claims and reports them.

    python -m experiments.claims [--blocks=A,B] [--arms=fid,lumen] [--seeds=0,1] [--start=FILE]
                                 [--output=DIR]
    python -m experiments.claims --report    # rewrites the report from the results, runs nothing
    python -m experiments.claims --smoke     # the same procedure with tiny runs, in minutes

A unit is a block, an arm and a seed (`claim_arms`). Its result is appended to
`experiments/claims.jsonl` as soon as it is known, and finished units are skipped, so that rerunning
the command resumes it and an interruption loses at most the current stage. Runs that units share
are trained once per output folder: where that folder does not last, finish one arm after the other.
Training and evaluation use one core, on which a run costs a fifth less than on two. Several clones,
each with its own `--arms` and core (`taskset -c N`), work side by side; their results files, one after
the other, are a results file.
Block T tunes learning rates on dev; run it before the others, or they use the rates of the recipe.
Block S measures speed; run it alone on an idle machine. Rerunning it repeats
measurements that had other work beside them.

    experiments/claims.jsonl    a line per unit
    experiments/claims.json     statistics and verdicts
    docs/results.md             the report, with plots beside it
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import claim_arms, claim_report
from experiments.claim_analysis import is_idle
from experiments.claim_arms import ARMS, BLOCKS, TUNING, Arm, Scale, Selection
from experiments.claim_results import Results, digest
from experiments.command import cores, glimmer, run_module
from experiments.train_pydocs import CUTS, SEEDS_PER_RUN, START, TASK, metrics, write_data
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.shipped import CHECKPOINTS
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.storage.lease import WriterLock

PASSAGES = "data/pydocs/passages"
QUESTIONS = f"data/pydocs/retrieved_{claim_arms.DEPTH}"
SPLITS = ("dev", "test")
RESULTS = Path("experiments/claims.jsonl")
RECALL_AT = (5, 10, 20, claim_arms.DEPTH)  # K of block B's curves of recall


class Unit(NamedTuple):
    """The piece of work that is run, recorded and skipped as a whole."""

    block: str
    arm: str
    seed: int
    rate: float | None = None  # factor of the learning rate; None is the best on dev


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all unfinished units, then writes the report. Exits at the first failing command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--blocks", help=f"{TUNING} tunes rates, S measures speed; default: all others"
    )
    parser.add_argument("--arms", help="separated by commas; default: all of each block")
    parser.add_argument(
        "--seeds", help="separated by commas; default: as many as each block's verdict needs"
    )
    parser.add_argument("--start", type=Path, default=CHECKPOINTS / f"pydocs_{START}.safetensors")
    parser.add_argument("--output", type=Path, default=Path("runs/claims"), help="of the runs")
    parser.add_argument("--report", action="store_true", help="only rewrite the report")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, reported into --output")
    args = parser.parse_args(argv)
    default = [block for block, about in BLOCKS.items() if args.smoke or not about.speed]
    blocks = default if args.blocks is None else args.blocks.split(",")
    if unknown := sorted(set(blocks) - {TUNING, *BLOCKS}):
        parser.error(f"--blocks must be among {TUNING}, {', '.join(BLOCKS)}; got {unknown}.")
    try:
        seeds = None if args.seeds is None else [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be numbers separated by commas, got {args.seeds!r}.")
    scale = claim_arms.SMOKE if args.smoke else Scale()
    if args.arms is not None:
        arms = tuple(args.arms.split(","))
        if unknown := sorted(set(arms) - set(scale.arms)):
            parser.error(f"--arms must be among {', '.join(scale.arms)}; got {unknown}.")
        scale = dataclasses.replace(scale, arms=arms)
    folders = claim_report.Folders()
    path = RESULTS
    if args.smoke:
        path, seeds = args.output / RESULTS.name, (seeds or [0])[:1]
        folders = claim_report.Folders(args.output, args.output)
    results = Results(path)
    if not args.report:
        if not args.start.is_file():
            parser.error(
                f"--start: expected the parameters that all arms start from, found no file {args.start}. "
                f"Train them: python -m experiments.train_pydocs --models={START}"
            )
        Study(scale, args.output, args.start, results).run(blocks, seeds)
    if any(unit["block"] in BLOCKS for unit in results.units):
        claim_report.write(results, folders)
    else:
        print(f"{results.path}: no block has run, so there is nothing to report.")


class Study:
    """Runs units and records them."""

    def __init__(self, scale: Scale, output: Path, start: Path, results: Results):
        self._scale, self._output, self._start, self._results = scale, output, start, results
        self._checksum = hashlib.sha256(start.read_bytes()).hexdigest()[:12]
        about = {
            "recipe": claim_arms.RECIPE,
            "start": self._checksum,
            "stages": [dataclasses.asdict(stage) for stage in scale.stages],
            "task": TASK,
            "cuts": CUTS,
            "first_seed": claim_arms.FIRST_SEED,
        }
        self._procedure = results.add_procedure(about)
        self._questions = ""  # known once the files are written

    def run(self, blocks: Sequence[str], seeds: Sequence[int] | None) -> None:
        """Runs the unfinished units of the blocks, seed by seed; None: as many seeds as each needs.

        Raises ValueError if another process runs units in the same folder.
        """
        self._output.mkdir(parents=True, exist_ok=True)
        with WriterLock(open_folder(self._output), "claims.lock"):
            self._prepare()
            if TUNING in blocks:
                self._run_all(list(self._tuning()))
                # Known now: which of them are best at an edge.
                self._run_all(list(self._tuning()))
            units = list(self._units([block for block in blocks if block != TUNING], seeds))
            if untuned := [
                arm for arm in dict.fromkeys(x.arm for x in units) if not self._is_tuned(arm)
            ]:
                _print(
                    f"claims: learning rates of {', '.join(untuned)} are not tuned. Units are repeated "
                    f"if block {TUNING} chooses others; run it first."
                )
            self._run_all(units)

    def _tuning(self) -> Iterator[Unit]:
        for arm in claim_arms.TUNED:
            if arm in self._scale.arms:
                for rate in self._factors(arm):
                    yield Unit(TUNING, arm, claim_arms.TUNING_SEED, rate)

    def _units(self, blocks: Sequence[str], seeds: Sequence[int] | None) -> Iterator[Unit]:
        """Seed by seed within a block, so that an early stop leaves complete seeds."""
        for block in blocks:
            chosen = list(range(BLOCKS[block].seeds) if seeds is None else seeds)
            for seed in chosen[:1] if BLOCKS[block].speed else chosen:
                for arm in BLOCKS[block].arms:
                    if arm in self._scale.arms:
                        yield Unit(block, arm, seed)

    def _run_all(self, units: list[Unit]) -> None:
        todo = [unit for unit in units if not self._is_done(unit)]
        done = len(units) - len(todo)
        progress = Progress("claims", len(units), "units", done=done, emit=_print)
        for unit in todo:
            progress.log(f"next: block {unit.block}, {unit.arm}, seed {unit.seed}")
            self._results.append(self._run(unit))
            progress.advance()
        progress.log()

    def _is_done(self, unit: Unit) -> bool:
        """Whether a unit has a result; a speed that was measured beside other work does not count."""
        found = self._results.find(**self._identity(unit))
        return found is not None and all(
            is_idle(result)
            for result in found["results"].values()
            if result.get("other_load") is not None
        )

    def _prepare(self) -> None:
        write_data()
        files = [Path(QUESTIONS, f"{task}-{split}.jsonl") for task in TASKS for split in SPLITS]
        if not all(file.is_file() for file in files):
            glimmer(
                "retrieve",
                "examples/pydocs_retrieve",
                QUESTIONS="data/pydocs/corpus/questions/*-[dt]e*.jsonl",  # those of SPLITS
                DATA_DIR=QUESTIONS,
                NUM_PASSAGES=claim_arms.DEPTH,
            )
        self._questions = self._results.add_questions(
            Path(QUESTIONS), Path(PASSAGES), self._scale.num_examples
        )

    def _rate(self, unit: Unit) -> float:
        """The factor of the learning rate: the unit's own, or the best known; 1 before tuning."""
        if unit.rate is not None:
            return unit.rate
        source = ARMS[unit.arm].model
        found = self._on_dev(source, self._factors(source))
        # Without all of the first, the best would depend on the order of the runs.
        if len(found) < len(claim_arms.RATES):
            return 1.0
        return max(found, key=lambda rate: found[rate])

    def _factors(self, name: str) -> list[float]:
        """The factors to try: one more where the best of the first is at an edge."""
        found = self._on_dev(name, claim_arms.RATES)
        best = max(found, key=lambda rate: found[rate], default=None)
        if len(found) < len(claim_arms.RATES) or best not in claim_arms.BEYOND:
            return list(claim_arms.RATES)
        return [*claim_arms.RATES, claim_arms.BEYOND[best]]

    def _is_tuned(self, name: str) -> bool:
        """Whether all factors of an arm's model have been tried."""
        factors = self._factors(ARMS[name].model)
        return len(self._on_dev(ARMS[name].model, factors)) == len(factors)

    def _on_dev(self, arm: str, factors: Sequence[float]) -> dict[float, float]:
        """Exact match on dev, summed over tasks, of the factors that are known."""
        found = {}
        for rate in factors:
            tuned = self._results.find(
                **self._identity(Unit(TUNING, arm, claim_arms.TUNING_SEED, rate))
            )
            if tuned is not None:
                by_task = tuned["results"][ARMS[arm].default.key]["exact_match"]
                found[rate] = sum(by_task.values())
        return found

    def _identity(self, unit: Unit) -> dict[str, Any]:
        """Fields that a unit's record must have to count as this unit's result."""
        arm, rate = ARMS[unit.arm], self._rate(unit)
        return {
            "block": unit.block,
            "arm": unit.arm,
            "seed": unit.seed,
            "rate": rate,
            "settings": digest([arm.model, arm.settings, arm.adapted, arm.single]),
            "questions": self._questions,
            "procedure": self._procedure,
        }

    def _run(self, unit: Unit) -> dict[str, Any]:
        """Trains what is missing, evaluates, and returns the record."""
        arm, identity = ARMS[unit.arm], self._identity(unit)
        runs: dict[str, str] = {}
        spent = 0.0
        for tasks in [(task,) for task in TASKS] if arm.single else [TASKS]:
            task = tasks[0] if arm.single else None
            run, seconds = self._train(arm, unit.seed, identity["rate"], task)
            spent += seconds
            runs |= dict.fromkeys(tasks, str(run))
        trained = time.monotonic()
        found = self._evaluate(unit, arm, runs)
        evaluated = time.monotonic() - trained
        return {
            **identity,
            "seconds": {"train": round(spent), "evaluate": round(evaluated)},
            "machine": f"{platform.machine()}, {cores()} cores",
            **found,
        }

    def _train(self, arm: Arm, seed: int, rate: float, task: str | None) -> tuple[Path, float]:
        """The last run of an arm's chain, and the seconds of training that it still took."""
        gin_file, cut = CUTS[arm.model]
        previous, spent = self._without_head(), 0.0
        macros_of_arm = dict(arm.settings)
        for stage in self._scale.stages:
            if stage.name == claim_arms.ADAPT.name:
                if arm.adapted is None:
                    continue
                macros_of_arm |= arm.adapted
                if "MEMORY_CODEC" in arm.adapted:
                    previous = self._with_codebooks(previous)
            num_passages = stage.settings["TASK_FEATURE_LENGTHS"]["passages"][0]
            macros = {**TASK, **stage.settings, **cut, **macros_of_arm}
            if arm.reranks:
                macros["NUM_KEPT"] = min(claim_arms.KEPT, num_passages)
            macros["LEARNING_RATE"] *= rate
            if task is not None:
                mixture = macros["MIXTURE_OR_TASK_NAME"]
                macros["MIXTURE_OR_TASK_NAME"] = mixture.replace("_", f"_{task}_", 1)
            steps = claim_arms.task_steps(stage, task)
            macros |= {
                "TRAIN_STEPS": steps,
                "WARMUP_STEPS": min(macros["WARMUP_STEPS"], steps // 5),
                "RANDOM_SEED": SEEDS_PER_RUN * (claim_arms.FIRST_SEED + seed) + stage.number,
                "KEEP_LATEST": 1,
                "INITIAL_CHECKPOINT_PATH": previous,
            }
            # Equal runs of several arms have the same name and are trained once.
            name = digest([claim_arms.RECIPE, gin_file, macros])
            run = self._output / f"{stage.name}_{name}"
            finished = run / "finished"
            if not finished.is_file():
                glimmer("train", gin_file, devices=1, MODEL_DIR=run, **macros)
                finished.touch()
                spent += metrics(run)[-1]["train/alive_seconds"]
            previous = run
        return previous, spent

    def _without_head(self) -> Path:
        """The start without its scoring head: in FiD's cut, which has none."""
        path = self._output / f"start_{self._checksum}.safetensors"
        # The JSON is written last.
        if not path.with_suffix(".json").is_file():
            glimmer(
                "export",
                "runs/export",
                "sizes/tiny",
                "models/fid",
                CHECKPOINT_PATH=self._start,
                OUTPUT_PATH=path,
            )
        return path

    def _with_codebooks(self, run: Path) -> Path:
        """The parameters of a run with codebooks for its memory."""
        path = self._output / f"{run.name}_codes_{digest(claim_arms.CODES)}.safetensors"
        if not path.with_suffix(".json").is_file():
            glimmer(
                "codebooks",
                "runs/codebooks",
                CHECKPOINT_PATH=run,
                PASSAGES_DIR=PASSAGES,
                OUTPUT_PATH=path,
                **claim_arms.CODES,
            )
        return path

    def _evaluate(self, unit: Unit, arm: Arm, runs: dict[str, str]) -> dict[str, Any]:
        block = BLOCKS.get(unit.block)
        kind = "default" if block is None else block.selections
        orders = kind == "orders"
        job = {
            "runs": runs,
            "reranks": arm.reranks,
            "selections": self._scale.selections(arm, kind),
            "recalls": [
                Selection(order, k, m)
                for order in claim_arms.ORDERS
                for k in RECALL_AT
                for m in claim_arms.KEPT_PASSAGES
            ]
            if orders
            else [],
            "questions": QUESTIONS,
            "passages": PASSAGES,
            "split": "dev" if block is None else "test",
            "num_examples": self._scale.num_examples,
            "adaptive": kind == "adaptive",
            "nats": bool(block and block.nats),
            "speed_questions": self._scale.speed_questions if block and block.speed else None,
        }
        # Names of their own: an evaluation that outlived a killed study must not write another's.
        name = digest(job)
        given, result = self._output / f"job_{name}.json", self._output / f"result_{name}.json"
        job["scratch"] = str(self._output / f"memory_{name}")
        given.write_text(json.dumps(job), encoding="utf-8")
        devices = None if job["speed_questions"] else 1
        run_module("experiments.claim_evaluation", str(given), str(result), devices=devices)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        given.unlink()
        result.unlink()
        return found


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
