"""Names made up from the parts of real ones, for exercises that only reading can solve."""

import random
from collections.abc import Callable, Sequence

# Share of names that are blends of two. Names of modules never seen fall into smaller pieces of the
# vocabulary, which repeat within a title: copying them takes more than the piece before.
BLENDED = 0.6
# Share of names that are one of the last two made up, as it is or in other capitals, mostly of the same
# title: `ElementTree.ElementTree`, `expatbuilder.ExpatBuilder`. Copying takes more than the name before.
REPEATED = 0.15


def made_up_name(parts: Sequence[str], draw: random.Random, before: Sequence[str] = ()) -> str:
    """One of `parts`, or the head of one and the tail of another, or one of those before.

    Args:
      parts: of real names, none empty.
      draw: of all choices.
      before: names made up before; half of the blends take a piece of one of them, or all of it.
    """
    if before and draw.random() < REPEATED:
        return draw.choice(_CHANGES)(draw.choice(before[-2:]))
    name = draw.choice(parts)
    if draw.random() >= BLENDED:
        return name
    other = draw.choice(before if before and draw.random() < 0.5 else parts)
    head, tail = (name, other) if draw.random() < 0.5 else (other, name)
    cut = len(head) if draw.random() < 0.3 else draw.randint(1, len(head))
    return head[:cut] + tail[draw.randrange(len(tail)) :]


def _capitalised(name: str) -> str:
    return name[:1].upper() + name[1:]


_CHANGES: tuple[Callable[[str], str], ...] = (str, str.lower, str.upper, _capitalised)
