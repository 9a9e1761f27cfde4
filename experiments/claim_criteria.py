"""The criteria of the paper's claims: required parts are unchanged since before the first result.

A part of a claim is a contrast: a weighted sum of exact match (or of nats per token), averaged over
the three tasks, of arms under selections of passages. All arms of a seed share data and order, so a
contrast is paired. It is met if its lower bound is above `above`, or its upper bound below `below`;
the bounds are the outer ones of two 95 % intervals (`claim_statistics`). A claim holds if all its
required parts are met, does not hold if one is contradicted by its interval, and is undecided
otherwise.
"""

import dataclasses
from collections.abc import Sequence

# (arm, key of a selection, weight)
Term = tuple[str, str, float]
MARGIN = 0.02  # of equivalence and non-inferiority
CODE_MARGIN = 0.01  # of memory as codes
NATS_MARGIN = 0.02


@dataclasses.dataclass(frozen=True)
class Part:
    """A contrast and the bound that it must keep."""

    text: str
    terms: tuple[Term, ...]
    above: float | None = 0.0  # the lower bound must exceed this
    below: float | None = None  # the upper bound must stay below this
    required: bool = True  # otherwise it is only shown
    costs_more: bool = False  # the first of two terms must also have the higher counted cost
    nats: bool = False  # of negative log-likelihood per token instead of exact match


@dataclasses.dataclass(frozen=True)
class Rivals:
    """A part that must be met against every rival that qualifies."""

    text: str
    arm: str
    selection: str
    rivals: tuple[str, ...]  # arms, with all their selections
    above: float = 0.0
    cheaper: bool = True  # only rivals of equal or lower counted compute
    faster: bool = False  # must also answer more questions per second than the best rival
    required: bool = True


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper, or a question of this project, with its criterion."""

    name: str
    text: str
    blocks: str  # letters
    parts: tuple[Part | Rivals, ...]


def _difference(
    text: str,
    better: str,
    worse: str,
    selections: Sequence[str] | str = "learned:10:1",
    required: bool = True,
) -> Part:
    """First minus second arm, each under its selection or both under the same one."""
    first, second = (selections,) * 2 if isinstance(selections, str) else selections
    return Part(text, ((better, first, 1.0), (worse, second, -1.0)), required=required)


READ_ALL = "retriever:10:10"
BEST_ONE = "learned:10:1"
_SYSTEMS = (
    ("FiD", "fid", READ_ALL),
    ("LUMEN", "lumen", READ_ALL),
    ("GLIMMER", "glimmer", BEST_ONE),
    ("LUMEN with fewer live layers", "lumen_small", READ_ALL),
    ("GLIMMER with fewer live layers", "glimmer_small", BEST_ONE),
)


def _gain(arm: str, selection: str, weight: float = 1.0) -> tuple[Term, ...]:
    return ((arm, selection, weight), (f"{arm}_single", selection, -weight))


CLAIMS = (
    Claim(
        "1",
        "GLIMMER is better than LUMEN and FiD at equal compute, and faster at equal quality.",
        "AS",
        (
            Rivals(
                "GLIMMER, one of ten kept, above every FiD and LUMEN of equal or lower compute",
                "glimmer",
                BEST_ONE,
                ("fid", "lumen"),
            ),
            Rivals(
                "at most 2 points below every FiD and LUMEN of any K, and faster than the best",
                "glimmer",
                BEST_ONE,
                ("fid", "lumen"),
                above=-MARGIN,
                cheaper=False,
                faster=True,
            ),
        ),
    ),
    Claim(
        "2",
        "Training on all tasks helps all three systems, most with few live layers.",
        "AF",
        (
            *(
                Part(f"all tasks above one task, {title}", _gain(arm, selection))
                for title, arm, selection in _SYSTEMS
            ),
            Part(
                "larger gain with fewer live layers, LUMEN",
                (*_gain("lumen_small", READ_ALL), *_gain("lumen", READ_ALL, -1.0)),
            ),
            Part(
                "larger gain with fewer live layers, GLIMMER",
                (*_gain("glimmer_small", BEST_ONE), *_gain("glimmer", BEST_ONE, -1.0)),
            ),
        ),
    ),
    Claim(
        "3",
        "Quality rises with K at fixed m; gains from more m diminish.",
        "A",
        (
            *(
                _difference(
                    f"K = 20 above K = {m}, {m} kept",
                    "glimmer",
                    "glimmer",
                    (f"learned:20:{m}", f"learned:{m}:{m}"),
                )
                for m in (1, 2, 3)
            ),
            Part(
                "gain per passage from one to two kept above that from three to five, K = 20",
                (
                    ("glimmer", "learned:20:2", 1.0),
                    ("glimmer", "learned:20:1", -1.0),
                    ("glimmer", "learned:20:5", -0.5),
                    ("glimmer", "learned:20:3", 0.5),
                ),
            ),
            *(
                _difference(
                    f"{title} kept above one, K = 20",
                    "glimmer",
                    "glimmer",
                    (f"learned:20:{m}", "learned:20:1"),
                    required=False,
                )
                for m, title in ((2, "two"), (5, "five"))
            ),
        ),
    ),
    Claim(
        "4",
        "A separate reranker is no better than the built-in one and costs more.",
        "AD",
        (
            Part(
                "separate minus built-in reranker below 2 points, at higher counted compute",
                (("separate", BEST_ONE, 1.0), ("glimmer", BEST_ONE, -1.0)),
                above=None,
                below=MARGIN,
                costs_more=True,
            ),
        ),
    ),
    Claim(
        "5",
        "A lower temperature helps the distillation.",
        "C",
        (
            _difference("temperature 0.1 above 1", "tau_0.1", "tau_1"),
            _difference("temperature 0.3 above 1", "tau_0.3", "tau_1", required=False),
            _difference(
                "temperature 0.1 above no distillation", "tau_0.1", "unranked", required=False
            ),
        ),
    ),
    Claim(
        "orders",
        "The learned order is above the retriever's.",
        "B",
        (
            _difference(
                "learned above the retriever's order, one of 30 kept",
                "glimmer",
                "glimmer",
                ("learned:30:1", "retriever:30:1"),
            ),
            _difference(
                "gold passages first above learned",
                "glimmer",
                "glimmer",
                ("oracle:30:1", "learned:30:1"),
                required=False,
            ),
            _difference(
                "learned above the string rule",
                "glimmer",
                "glimmer",
                ("learned:30:1", "rule:30:1"),
                required=False,
            ),
        ),
    ),
    Claim(
        "memory",
        "A trained memory encoder is better than a frozen one.",
        "AE",
        (
            _difference("trained above frozen memory, LUMEN", "lumen_trained", "lumen", READ_ALL),
            _difference("trained above frozen memory, GLIMMER", "glimmer", "glimmer_frozen"),
        ),
    ),
    Claim(
        "codes",
        "Memory stored as codes, in a sixteenth of the bytes, costs nothing.",
        "H",
        (
            Part(
                "codes that follow the encoder at most 1 point below bfloat16",
                (("pq", BEST_ONE, 1.0), ("bf16", BEST_ONE, -1.0)),
                above=-CODE_MARGIN,
            ),
            Part(
                "the same, at most 0.02 nats per token above bfloat16",
                (("pq", BEST_ONE, 1.0), ("bf16", BEST_ONE, -1.0)),
                above=None,
                below=NATS_MARGIN,
                nats=True,
            ),
            _difference("following above fixed codes", "pq", "pq_fixed", required=False),
            Part(
                "the same, in nats per token",
                (("pq", BEST_ONE, 1.0), ("pq_fixed", BEST_ONE, -1.0)),
                above=None,
                below=0.0,
                required=False,
                nats=True,
            ),
        ),
    ),
)
