"""Statistics and verdicts of `experiments.claims` from its results file."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.claim_arms import ARMS, BLOCKS, TUNING
from experiments.claim_criteria import CLAIMS, Claim, Part, Rivals, Term
from experiments.claim_results import NATS_UNIT, Results, decode_numbers, unpack
from experiments.claim_statistics import Estimate, estimate
from glimmer_jax.pydocs.questions import TASKS

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
FEW_SEEDS, NOT_RUN = "not enough seeds", "not run"
MASS = "mass:"  # prefix of block G's selections
IDLE = 0.2  # cores that other processes may keep busy during a measurement of speed


@dataclasses.dataclass(frozen=True)
class Judged:
    """A part with its estimate; `estimate` is None without two seeds that have all its arms."""

    text: str
    verdict: str
    required: bool
    seeds: tuple[int, ...]
    estimate: Estimate | None = None
    nats: bool = False  # of nats per token instead of exact match


class Study:
    """The units of the newest procedure and questions.

    Attributes:
      pages: task -> int64 `[n]`, number of each test question's page.
      stale: number of units of other procedures, questions or settings, which are left out.
      units: (block, arm, seed) -> record.
    """

    def __init__(self, results: Results):
        """Raises ValueError if the results have no unit."""
        known = [unit for unit in results.units if unit["block"] in BLOCKS and unit["arm"] in ARMS]
        if not known:
            raise ValueError(
                f"{results.path}: expected units of blocks {', '.join(BLOCKS)}, found none. Run "
                "python -m experiments.claims."
            )
        newest = known[-1]
        self.procedure = results.procedures[newest["procedure"]]["about"]
        questions = results.questions[newest["questions"]]
        self.baselines: Mapping[str, Mapping[str, float]] = questions["baselines"]
        self.pages = {task: decode_numbers(text) for task, text in questions["pages"].items()}
        same = [
            unit
            for unit in known
            if all(unit[name] == newest[name] for name in ("procedure", "questions"))
        ]
        # An arm whose settings or learning rate changed is repeated.
        current = {unit["arm"]: (unit["settings"], unit["rate"]) for unit in same}
        self.units = {
            (unit["block"], unit["arm"], unit["seed"]): unit
            for unit in same
            if current[unit["arm"]] == (unit["settings"], unit["rate"])
            and _has_rate_of_its_source(unit, current)
        }
        # A measurement of speed may be repeated.
        names = ("block", "arm", "seed", "procedure", "questions", "settings", "rate")
        self.stale = len({tuple(unit[name] for name in names) for unit in known}) - len(self.units)
        tuning = [unit for unit in results.units if unit["block"] == TUNING]
        self.tuning = [unit for unit in tuning if unit["procedure"] == newest["procedure"]]

    def seeds(
        self, arm: str, selection: str, measure: str = "hits"
    ) -> dict[int, Mapping[str, Any]]:
        """Seed -> result of an arm under a selection, from any block that has this measure of it."""
        found = {}
        for (_, name, seed), unit in sorted(self.units.items(), reverse=True):
            result = unit["results"].get(selection, {})
            if name == arm and measure in result:
                found[seed] = result
        return dict(sorted(found.items()))

    def selections(self, arm: str) -> list[str]:
        """Keys of all selections under which an arm has answered."""
        keys = [
            key
            for (_, name, _), unit in self.units.items()
            for key, result in unit["results"].items()
            if name == arm and "hits" in result
        ]
        return list(dict.fromkeys(keys))

    def gflop(self, arm: str, selection: str) -> float:
        """Counted cost of a question, mean over seeds; NaN if unknown."""
        costs = [result["gflop"] for result in self.seeds(arm, selection).values()]
        return float(np.mean(costs)) if costs else float("nan")

    def speed(self, arm: str, selection: str) -> dict[str, Any] | None:
        """Block S's measurement: `questions_per_second` and `other_load`."""
        for (block, name, _), unit in self.units.items():
            if BLOCKS[block].speed and name == arm and selection in unit["results"]:
                found: dict[str, Any] = unit["results"][selection]
                return found
        return None

    def contrast(
        self, terms: Sequence[Term], nats: bool = False
    ) -> tuple[tuple[int, ...], Estimate | None]:
        """Weighted sum of exact match, or of nats per token, over the seeds that have all terms."""
        measure = "nats" if nats else "hits"
        by_term = [self.seeds(arm, selection, measure) for arm, selection, _ in terms]
        seeds = tuple(sorted(set.intersection(*(set(found) for found in by_term))))
        if not seeds:
            return seeds, None
        values = {}
        for task in TASKS:
            count = len(self.pages[task])
            rows = [
                sum(
                    weight * _values(found[seed], measure, task, count)
                    for (_, _, weight), found in zip(terms, by_term, strict=True)
                )
                for seed in seeds
            ]
            values[task] = np.array(rows, np.float64)
        return seeds, estimate(values, self.pages)

    def hours(self, blocks: Sequence[str]) -> float:
        """Training and evaluation of all units of some blocks."""
        units = [unit for (block, _, _), unit in self.units.items() if block in blocks]
        return sum(sum(unit["seconds"].values()) for unit in units) / 3600


def _has_rate_of_its_source(
    unit: Mapping[str, Any], current: Mapping[str, tuple[str, float]]
) -> bool:
    """Whether an arm that uses another arm's learning rate has the one that this arm has now."""
    source = ARMS[unit["arm"]].model
    return source not in current or current[source][1] == unit["rate"]


def _values(result: Mapping[str, Any], measure: str, task: str, count: int) -> np.ndarray:
    """A measure of each question of a task, `[count]`."""
    packed = result[measure][task]
    if measure == "hits":
        return unpack(packed, count)
    return decode_numbers(packed) * NATS_UNIT


def judge(study: Study, claim: Claim) -> tuple[str, list[Judged]]:
    """The verdict on a claim, and its parts."""
    # A contrast has the seeds that all its blocks have; speed is measured once.
    needed = min(BLOCKS[block].seeds for block in claim.blocks if not BLOCKS[block].speed)
    parts = [_judge_part(study, part, needed) for part in claim.parts]
    verdicts = {part.verdict for part in parts if part.required}
    if len(verdicts) == 1:
        return verdicts.pop(), parts
    # One contradicted part decides; where only some parts have results, nothing is decided.
    return next((each for each in (FAILS, FEW_SEEDS) if each in verdicts), UNDECIDED), parts


def judge_all(study: Study) -> dict[str, tuple[str, list[Judged]]]:
    """Verdict and parts of every claim, by its name."""
    return {claim.name: judge(study, claim) for claim in CLAIMS}


def _judge_part(study: Study, part: Part | Rivals, needed: int) -> Judged:
    if isinstance(part, Rivals):
        return _judge_rivals(study, part, needed)
    seeds, found = study.contrast(part.terms, part.nats)
    verdict = _verdict(found, len(seeds), needed, part.above, part.below)
    if part.costs_more and found is not None:
        first, second = (study.gflop(arm, key) for arm, key, _ in part.terms)
        verdict = verdict if first > second else FAILS
    return Judged(part.text, verdict, part.required, seeds, found, part.nats)


def _verdict(
    found: Estimate | None, seeds: int, needed: int, above: float | None, below: float | None
) -> str:
    if found is None:
        return NOT_RUN
    if seeds < needed:
        return FEW_SEEDS
    if (above is None or found.low > above) and (below is None or found.high < below):
        return HOLDS
    if (above is not None and found.high <= above) or (below is not None and found.low >= below):
        return FAILS
    return UNDECIDED


def _judge_rivals(study: Study, part: Rivals, needed: int) -> Judged:
    """The part against all its rivals; it is shown against the closest, the one with the best mean.

    One rival that contradicts it decides. The speed is compared with that of the best rival.
    """
    own = study.gflop(part.arm, part.selection)
    judged = []
    for arm, key in [(rival, key) for rival in part.rivals for key in study.selections(rival)]:
        if part.cheaper and not study.gflop(arm, key) <= own:
            continue
        terms = ((part.arm, part.selection, 1.0), (arm, key, -1.0))
        seeds, found = study.contrast(terms)
        if found is not None:
            verdict = _verdict(found, len(seeds), needed, part.above, None)
            judged.append((found, seeds, arm, key, verdict))
    if {arm for _, _, arm, *_ in judged} != set(part.rivals):
        return Judged(part.text, NOT_RUN, part.required, ())
    closest = min(judged, key=lambda row: row[0].mean)
    verdicts = {verdict for *_, verdict in judged}
    verdict = next(each for each in (FAILS, FEW_SEEDS, UNDECIDED, HOLDS) if each in verdicts)
    if verdict == FAILS:
        closest = min((row for row in judged if row[-1] == FAILS), key=lambda row: row[0].mean)
    found, seeds, arm, key, _ = closest
    limit = f" of {own:.2f} GFLOP" if part.cheaper else ""
    text = f"{part.text}{limit} (closest: {ARMS[arm].about}, K = {key.split(':')[1]})"
    if part.faster and verdict != FAILS:
        speeds = study.speed(part.arm, part.selection), study.speed(arm, key)
        if speeds[0] is None or speeds[1] is None:
            verdict, text = UNDECIDED, f"{text}; speed not measured"
        elif not all(map(is_idle, speeds)):
            verdict = UNDECIDED
        elif speeds[0]["questions_per_second"] <= speeds[1]["questions_per_second"]:
            verdict = FAILS
    return Judged(text, verdict, part.required, seeds, found)


def is_idle(speed: Mapping[str, Any]) -> bool:
    """Whether a speed was measured without other work beside it; False if that is unknown."""
    return speed["other_load"] is not None and bool(speed["other_load"] <= IDLE)


def adaptive(study: Study, arm: str = "glimmer") -> list[dict[str, Any]]:
    """Block G: for each threshold, choosing m per question against fixed m at equal mean compute.

    A fixed m between two compiled ones is a mixture: a share of all questions keeps the smaller.

    Returns:
      `{"threshold", "gflop", "seeds", "estimate"}`; the estimate is None without results.
    """
    fixed = sorted(
        (study.gflop(arm, key), key)
        for key in study.selections(arm)
        if key.startswith("learned:10:")
    )
    rows = []
    for key in sorted(key for key in study.selections(arm) if key.startswith(MASS)):
        cost = study.gflop(arm, key)
        bounded = min(max(cost, fixed[0][0]), fixed[-1][0])  # but for rounding, it is between them
        for (low, first), (high, second) in itertools.pairwise(fixed):
            if low <= bounded <= high:
                share = (bounded - low) / (high - low)
                terms = ((arm, key, 1.0), (arm, first, share - 1.0), (arm, second, -share))
                seeds, found = study.contrast(terms)
                rows.append(
                    {
                        "threshold": float(key.removeprefix(MASS)),
                        "gflop": cost,
                        "seeds": seeds,
                        "estimate": found,
                    }
                )
                break
    return rows
