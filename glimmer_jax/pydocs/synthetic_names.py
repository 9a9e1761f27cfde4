"""Synthetic names, made from parts of real ones, for exercises that require reading."""

import random
from collections.abc import Callable, Sequence

# Share of names that are blends of two parts. Names of held-out modules split into short pieces,
# which repeat within a title, so that the previous piece alone does not determine the next one.
# Blends train this.
BLENDED = 0.6
# Share of names that repeat one of the last two names, often with another capitalisation, as in
# `ElementTree.ElementTree` and `expatbuilder.ExpatBuilder`.
REPEATED = 0.15


def synthetic_name(parts: Sequence[str], draw: random.Random, previous: Sequence[str] = ()) -> str:
    """Returns a part, the head of one part with the tail of another, or a variant of a previous name.

    Args:
      parts: of real names, none empty.
      draw: the source of randomness.
      previous: names drawn before; half of the blends use a piece of one of them, or all of it.
    """
    if previous and draw.random() < REPEATED:
        return draw.choice(_CHANGES)(draw.choice(previous[-2:]))
    name = draw.choice(parts)
    if draw.random() >= BLENDED:
        return name
    other = draw.choice(previous if previous and draw.random() < 0.5 else parts)
    head, tail = (name, other) if draw.random() < 0.5 else (other, name)
    cut = len(head) if draw.random() < 0.3 else draw.randint(1, len(head))
    return head[:cut] + tail[draw.randrange(len(tail)) :]


def _capitalised(name: str) -> str:
    return name[:1].upper() + name[1:]


_CHANGES: tuple[Callable[[str], str], ...] = (str, str.lower, str.upper, _capitalised)
