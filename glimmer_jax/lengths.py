"""TASK_FEATURE_LENGTHS: how many tokens questions, answers and passages get."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Lengths(NamedTuple):
    """Static sizes of a batch; letters as in `glimmer_jax.axes`."""

    question: int  # Q, tokens
    target: int  # T, tokens, end token included
    passages: int  # K, passages of a question
    passage: int  # P, tokens, end token included


def check_lengths(lengths: Mapping[str, Any]) -> Lengths:
    """The sizes in `{"inputs": Q, "targets": T, "passages": (K, P)}`.

    Raises:
      ValueError: another form.
    """
    wanted = '{"inputs": Q, "targets": T, "passages": (K, P)}, whole numbers of at least 1'
    try:
        count, passage = lengths["passages"]
        found = Lengths(lengths["inputs"], lengths["targets"], count, passage)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"TASK_FEATURE_LENGTHS must be {wanted}; got {lengths!r}.") from None
    if not all(isinstance(value, int) and value >= 1 for value in found):
        raise ValueError(f"TASK_FEATURE_LENGTHS must be {wanted}; got {lengths!r}.")
    return found
