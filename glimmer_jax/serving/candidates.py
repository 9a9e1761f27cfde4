"""Answers restricted to a given set, such as FEVER's SUPPORTS and REFUTES."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glimmer_jax.data.vocabulary import Vocabulary


def encode_candidates(candidates: Sequence[str], vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Texts to int32 `[N, T]`, each with its end token, then 0.

    Args:
      candidates: the answers to choose from.
      vocabulary: of the model.
      length: T.

    Raises:
      ValueError: there are none, one is empty or given twice, or longer than T.
    """
    if isinstance(candidates, str) or not all(isinstance(one, str) for one in candidates):
        raise ValueError(f'CANDIDATES is a list of answers, ["yes", "no"]; got {candidates!r}.')
    if not candidates:
        raise ValueError(
            "CANDIDATES is an empty list: give the answers to choose from, or None to let the model "
            "write its own."
        )
    tokens_NT = np.zeros((len(candidates), length), np.int32)
    seen: dict[tuple[int, ...], str] = {}
    for row, text in enumerate(candidates):
        ids = (*vocabulary.encode(text), vocabulary.eos_id)
        if len(ids) == 1:
            raise ValueError(f"Candidate {row} of CANDIDATES, {text!r}, is empty. Leave it out.")
        if len(ids) > length:
            raise ValueError(
                f"Candidate {text!r} of CANDIDATES has {len(ids)} tokens, end token included, and "
                f"answers have {length}. Shorten it, or raise targets in TASK_FEATURE_LENGTHS."
            )
        if ids in seen:
            raise ValueError(
                f"Candidates {seen[ids]!r} and {text!r} of CANDIDATES have the same tokens. Leave one "
                "out."
            )
        seen[ids] = text
        tokens_NT[row, : len(ids)] = ids
    return tokens_NT


def add_candidates(batch: dict[str, Any], tokens_NT: np.ndarray | None) -> dict[str, Any]:
    """The batch with the same `candidate_tokens` for every question; as it is where there are none."""
    if tokens_NT is None:
        return batch
    rows = len(batch["question_tokens"])
    return {**batch, "candidate_tokens": np.broadcast_to(tokens_NT, (rows, *tokens_NT.shape))}
