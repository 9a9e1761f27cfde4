"""Questions as a numpy batch for the model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glimmer_jax.axes import Lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.serving.step import Batch
from glimmer_jax.vocabulary import Vocabulary, question_text


def check_something_to_read(passages_dir: Any | None, memory_dir: Any | None) -> None:
    """Raises ValueError if there are neither passages nor a memory."""
    if passages_dir is None and memory_dir is None:
        raise ValueError(
            "There is nothing to read: set PASSAGES_DIR (passages are encoded for each question) "
            "or MEMORY_DIR (written by --run_mode=build_memory)."
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A batch of questions, ready for `Predictor.predict`."""

    questions: Sequence[Mapping[str, Any]]
    passage_ids: list[list[int]]  # numbers of ids, in the retriever's order
    batch: Batch


def question_batch(
    questions: Sequence[str],
    passage_ids: Sequence[Sequence[int]],
    batch_size: int,
    lengths: Lengths,
    vocabulary: Vocabulary,
    passages: Passages | None,
) -> tuple[Batch, int]:
    """A batch without targets, and how many questions were cut at Q tokens.

    Args:
      questions: texts, at most `batch_size`; empty rows fill the batch.
      passage_ids: numbers of at most K ids per question.
      batch_size: rows.
      lengths: Q, T, K and P.
      vocabulary: of the questions.
      passages: the folder with the tokens of the passages; None leaves them to a memory lookup.

    Raises:
      ValueError: an id is not in the folder.
    """
    tokens_BQ = np.zeros((batch_size, lengths.question), np.int32)
    ids_BK = np.full((batch_size, lengths.passages), -1, np.int64)
    cut = 0
    for row, (question, ids) in enumerate(zip(questions, passage_ids, strict=True)):
        tokens = vocabulary.encode(question_text(question))
        cut += len(tokens) > lengths.question
        tokens = tokens[: lengths.question]
        tokens_BQ[row, lengths.question - len(tokens) :] = tokens
        ids_BK[row, : len(ids)] = ids
    batch: Batch = {
        "question_tokens": tokens_BQ,
        "passage_ids": ids_BK,
        "decoder_input_tokens": np.zeros((batch_size, lengths.target), np.int32),
    }
    if passages is not None:
        batch["passage_tokens"] = passages.tokens(passages.rows(ids_BK), lengths.passage)
    return batch, cut
