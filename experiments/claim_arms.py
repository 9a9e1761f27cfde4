"""The arms of `experiments.claims` as data: what is trained, what is evaluated, in which block.

All arms start from `pydocs_start`, which knows reading exercises only, without its scoring head, and
train on the same stages. A seed determines examples, their order and their synthetic names, and is
shared by all arms, so that differences are paired. Arms of a comparison differ only in `settings`, or
in those of the last stages (`adapted`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.train_pydocs import KEPT, MODEL_STAGES, Stage
from glimmer_jax.pydocs.questions import SHARES, TASKS

# Part of every unit's fingerprint; increase it after a change of the procedure that no setting shows.
RECIPE = 3
# Two stages of the shipped models, shortened so that a unit takes about 15 minutes of one core. They have
# one mixture of tasks, so that block F can give a single task as many examples. The shipped models read
# single passages before; in short runs that unlearns how to choose a passage: exact match of FiD on dev,
# at a factor of 1, was 0.16, 0.68 and 0.50 with 4,000 such steps before 1,200 and 100, and 0.53, 0.62
# and 0.73 with 1,600 and 100 alone, in half of the time.
STEPS = {"choose": 1600, "ten": 100}
LEARNING_RATES = {"choose": 0.008, "ten": 0.002}
_SHIPPED = tuple(
    dataclasses.replace(
        stage,
        steps=STEPS[stage.name],
        settings={**stage.settings, "LEARNING_RATE": LEARNING_RATES[stage.name]},
    )
    for stage in MODEL_STAGES
    if stage.name in STEPS
)
# For arms that change something late, and their control.
ADAPT = Stage(
    "adapt",
    _SHIPPED[0].number + 1,
    600,
    {**_SHIPPED[0].settings, "LEARNING_RATE": 0.004},
)
STAGES = (_SHIPPED[0], ADAPT, *_SHIPPED[1:])
# Streams of examples of the arms begin here, away from those of the shipped models.
FIRST_SEED = 1000
# Learning rates are chosen on dev with a seed of their own, as multiples of the stages' rates, for FiD,
# LUMEN and GLIMMER, in complete runs: a third of the steps preferred four times the rate, and in a run
# of 4,500 steps three times the rate lost fact verification. Their variants use the same ones.
TUNING_SEED = 500
RATES = (1.0, 2.0, 4.0)
# Tried as well if the best of `RATES` is at an edge: best -> further factor.
BEYOND = {RATES[0]: RATES[0] / 2, RATES[-1]: RATES[-1] * 2}


class Selection(NamedTuple):
    """The passages that a model reads: the first m of the first K, in some order."""

    order: str  # retriever, learned, oracle (gold first) or rule (`baselines.rule_order`)
    retrieved: int  # K
    kept: int  # m

    @property
    def key(self) -> str:
        """Name in the results file."""
        return f"{self.order}:{self.retrieved}:{self.kept}"


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model and the way it is trained."""

    name: str
    model: str  # cut, one of `train_pydocs.CUTS`
    about: str  # for the report
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # macros of all stages
    # Macros of the stage `adapt` and the last one; None leaves out `adapt`.
    adapted: Mapping[str, Any] | None = None
    single: bool = False  # a model per task, each with as many examples of it as the mixture has

    @property
    def reranks(self) -> bool:
        """Whether the arm's model answers with the best passages only."""
        return self.model == "glimmer"

    @property
    def default(self) -> Selection:
        """How the model answers where nothing else is said."""
        return Selection("learned", 10, 1) if self.reranks else Selection("retriever", 10, 10)


@dataclasses.dataclass(frozen=True)
class Block:
    """Arms that are evaluated in the same way."""

    title: str
    arms: tuple[str, ...]
    seeds: int  # required for a verdict
    selections: str = "default"  # a kind of `Scale.selections`
    note: str = ""  # for the report
    speed: bool = False  # measures questions per second, once per arm, instead of quality
    nats: bool = False  # also measures the negative log-likelihood of the right answers


def _distilled(temperature: float) -> dict[str, Any]:
    return {"DISTILLATION_WEIGHT": 1.0, "TEMPERATURE": temperature, "SUPERVISED_WEIGHT": 0.0}


# Memory stored as codes; before it, codebooks are learned from the encoder.
CODES = {"MEMORY_CODEC": "pq"}
SMALL = {"ALPHA": 0.29, "BETA": 0.5}  # two live layers of seven, one of which reranks
_ARMS = (
    Arm("fid", "fid", "FiD"),
    Arm("lumen", "lumen", "LUMEN"),
    Arm("glimmer", "glimmer", "GLIMMER"),
    Arm("tau_1", "glimmer", "distillation, temperature 1", _distilled(1.0)),
    Arm("tau_0.3", "glimmer", "distillation, temperature 0.3", _distilled(0.3)),
    Arm("tau_0.1", "glimmer", "distillation, temperature 0.1", _distilled(0.1)),
    Arm(
        "unranked",
        "glimmer",
        "no distillation: the retriever's order",
        {"DISTILLATION_WEIGHT": 0.0, "SUPERVISED_WEIGHT": 0.0},
    ),
    Arm("separate", "glimmer", "separate reranker of two layers", {"SEPARATE_RERANKER": True}),
    Arm("lumen_trained", "lumen", "LUMEN, trained memory", {"FREEZE_MEMORY": False}),
    Arm(
        "glimmer_frozen",
        "glimmer",
        "GLIMMER, frozen memory and a trained question encoder",
        {"FREEZE_MEMORY": True, "SHARE_QUESTION_ENCODER": False},
    ),
    Arm("bf16", "glimmer", "bfloat16", adapted={}),
    Arm(
        "pq",
        "glimmer",
        "codes, 1/16 of the size, that follow the encoder",
        adapted={**CODES, "TRAIN_CODEBOOKS": True},
    ),
    Arm("pq_fixed", "glimmer", "codes, 1/16 of the size, that stay as they are", adapted=CODES),
    Arm("lumen_small", "lumen", "LUMEN, two live layers", SMALL),
    Arm("glimmer_small", "glimmer", "GLIMMER, two live layers", SMALL),
    *(
        Arm(
            f"{name}_single",
            name.partition("_")[0],
            f"{about}, a model per task",
            settings,
            single=True,
        )
        for name, about, settings in (
            ("fid", "FiD", {}),
            ("lumen", "LUMEN", {}),
            ("glimmer", "GLIMMER", {}),
            ("lumen_small", "LUMEN, two live layers", SMALL),
            ("glimmer_small", "GLIMMER, two live layers", SMALL),
        )
    ),
)
ARMS = {arm.name: arm for arm in _ARMS}
MODELS = ("fid", "lumen", "glimmer")
BLOCKS = {
    "A": Block("Three systems over K and m", MODELS, 5, "grid"),
    "B": Block(
        "Orders of the passages",
        ("glimmer",),
        5,
        "orders",
        note="Oracle: gold passages first. Rule: passages of the page that the question names, then "
        "those\nwith the shortest span of its words.",
    ),
    "C": Block(
        "Distillation temperature",
        ("tau_1", "tau_0.3", "tau_0.1", "unranked"),
        5,
        note="The scores are learned by distillation only; the passages in training are those of the "
        "other blocks.",
    ),
    "D": Block("Separate reranker", ("separate",), 5),
    "E": Block(
        "Trained and frozen memory",
        ("lumen_trained", "glimmer_frozen"),
        5,
        note="With frozen memory, GLIMMER has a question encoder of its own, as LUMEN has.",
    ),
    "F": Block(
        "One task and all tasks",
        ("lumen_small", "glimmer_small", *(arm.name for arm in _ARMS if arm.single)),
        3,
        note="A model per task sees as many examples of its task as the model of all tasks does.",
    ),
    "G": Block("Number of kept passages per question", ("glimmer",), 5, "adaptive"),
    "H": Block(
        "Memory as codes",
        ("bf16", "pq", "pq_fixed"),
        5,
        note="All three train on after the first stage. Codebooks are learned from its encoder, which "
        "rounds its\nparameters to bfloat16; they follow the encoder as moving averages, or stay as they "
        "are.",
        nats=True,
    ),
    "S": Block("Measured speed", MODELS, 1, "grid", speed=True),
}
# Learning rates of these arms are tuned by block T, before the other blocks.
TUNING = "T"
TUNED = MODELS

RETRIEVED = (1, 2, 3, 5, 10, 20)  # K
KEPT_PASSAGES = (1, 2, 3, 5)  # m
ORDERS = ("retriever", "learned", "oracle", "rule")
DEPTH = 30  # passages retrieved for evaluation
# Block G keeps the fewest passages whose share of the reranker's softmax reaches a threshold.
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The amount of work: that of the study, or of its smoke test."""

    stages: tuple[Stage, ...] = STAGES
    retrieved: tuple[int, ...] = RETRIEVED
    kept: tuple[int, ...] = KEPT_PASSAGES
    num_examples: int | None = 1000  # questions of each task; None for all
    speed_questions: int = 512
    arms: tuple[str, ...] = tuple(ARMS)

    def selections(self, arm: Arm, kind: str) -> list[Selection]:
        """The selections of a block's kind (`Block.selections`) for an arm."""
        if kind == "default":
            return [arm.default] + ([Selection("learned", 10, KEPT)] if arm.reranks else [])
        if kind == "adaptive":
            return [Selection("learned", 10, kept) for kept in self.kept]
        if kind == "orders":
            return [Selection(order, DEPTH, kept) for order in ORDERS for kept in self.kept]
        if not arm.reranks:
            return [Selection("retriever", k, k) for k in self.retrieved]
        return [Selection("learned", k, m) for k in self.retrieved for m in self.kept if m <= k]


SMOKE = Scale(
    stages=tuple(dataclasses.replace(stage, steps=2) for stage in STAGES[:2]),
    retrieved=(1, 10),
    kept=(1, 3),
    num_examples=8,
    speed_questions=32,
    arms=("fid", "lumen", "glimmer", "tau_1", "tau_0.1", "separate", "glimmer_frozen")
    + ("glimmer_single", "bf16", "pq"),
)


def task_steps(stage: Stage, task: str | None) -> int:
    """Steps of a stage; for one task, those in which the mixture has as many examples of it."""
    if task is None:
        return stage.steps
    shares = [SHARES.get(name, 1.0) for name in TASKS]
    return max(1, round(stage.steps * SHARES.get(task, 1.0) / sum(shares)))
