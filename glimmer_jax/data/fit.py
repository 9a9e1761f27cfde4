"""Compares tasks and their first examples with the settings, before anything is compiled."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import seqio

from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.data import cache
from glimmer_jax.data.pipeline import check_vocabulary, find_mixture_or_task
from glimmer_jax.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# A larger share of unknown tokens is logged as a warning.
MAX_UNKNOWN = 0.01
# Feature -> its name in messages.
_TEXTS = {"inputs": "questions", "targets": "answers", "passages": "passages"}


def check_fit(
    mixture_or_task_name: str,
    split: str,
    lengths: Mapping[str, Any],
    *,
    vocabulary: Vocabulary,
    has_passages: bool,
    use_cached: bool = False,
    examples: int | None = 1000,
    max_cut: float = 0.1,
) -> dict[str, int]:
    """Counts truncated texts and unknown tokens of every task's first examples.

    Outside of the training split truncated texts are logged as a warning, because evaluation on
    truncated questions or answers is wrong. So are unknown tokens above `MAX_UNKNOWN`, in any split.

    Args:
      mixture_or_task_name: registered with seqio.
      split: train, validation or test.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      vocabulary: that of model and passages.
      has_passages: whether there is a passages folder or a memory.
      use_cached: read seqio's cache of the tasks.
      examples: number of examples of each task to check; None for all.
      max_cut: maximum share, from 0 to 1, of truncated questions and of truncated answers.

    Returns:
      Counts over all tasks: `examples`, and the number of them with a truncated question
      (`questions_cut`), a truncated answer (`answers_cut`), a truncated passage among those that the
      example itself holds (`passages_cut`), without a gold passage (`without_gold`), and without an
      answer, which no metric counts (`without_answer`); and `unknown_tokens`, tokens of these texts
      that the vocabulary cannot spell. `Passages.warn_of_cuts` and mode `passages` report on the
      passages of a folder.

    Raises:
      ValueError: a task has another vocabulary, its cache is unusable (`cache.check`), it names passages
        by id but there is no folder or memory, no example has an answer, no example has K passages, or
        more than `max_cut` of the questions or answers are longer than Q or T.
    """
    checked = check_lengths(lengths)
    names = ("examples", "questions_cut", "answers_cut", "passages_cut", "without_gold")
    totals = dict.fromkeys((*names, "without_answer", "unknown_tokens"), 0)
    check_vocabulary(mixture_or_task_name, vocabulary)
    for task in seqio.get_subtasks(find_mixture_or_task(mixture_or_task_name)):
        _check_task(task, split, has_passages)
        cached = use_cached and task.supports_caching
        if cached:
            cache.check(task, splits=[split])
        ds = task.get_dataset(None, split, cached, shuffle=False, num_epochs=1)
        first = ds.take(-1 if examples is None else examples).as_numpy_iterator()
        counts = _count(first, checked, vocabulary)
        _check_examples(task.name, split, counts, checked)
        totals["examples"] += counts.examples
        totals["without_gold"] += counts.without_gold
        totals["without_answer"] += counts.examples - counts.answered
        for key, text in counts.texts.items():
            _report(f"{task.name} ({split})", key, counts, max_cut, vocabulary, split != "train")
            totals[f"{_TEXTS[key]}_cut"] += text.cut
            totals["unknown_tokens"] += text.unknown
    return totals


@dataclasses.dataclass
class _Text:
    """Counts of one kind of text."""

    limit: int  # tokens
    cut: int = 0  # examples with a longer text
    longest: int = 0
    tokens: int = 0
    unknown: int = 0

    def add(self, tokens: np.ndarray, unk_id: int) -> None:
        """Counts the tokens of one example, `[n]` or `[K, P]`."""
        used = tokens > 0
        length = int(used.sum(axis=-1).max(initial=0)) if tokens.ndim > 1 else len(tokens)
        self.cut += length > self.limit
        self.longest = max(self.longest, length)
        self.tokens += int(used.sum())
        self.unknown += int((tokens == unk_id).sum())


@dataclasses.dataclass
class _Counts:
    texts: dict[str, _Text]
    examples: int = 0
    answered: int = 0
    without_gold: int = 0
    max_passages: int = 0


def _count(
    examples: Iterable[Mapping[str, Any]], lengths: Lengths, vocabulary: Vocabulary
) -> _Counts:
    limits = (lengths.question, lengths.target, lengths.passage)
    counts = _Counts({key: _Text(limit) for key, limit in zip(_TEXTS, limits, strict=True)})
    for example in examples:
        counts.examples += 1
        for key, text in counts.texts.items():
            if key in example:
                tokens = example[key]
                text.add(
                    tokens[: lengths.passages] if tokens.ndim > 1 else tokens, vocabulary.unk_id
                )
        retrieved = example.get("passage_ids", example.get("passages"))
        counts.max_passages = max(counts.max_passages, len(retrieved))
        counts.answered += bool(np.any(example["targets"] > vocabulary.eos_id))
        counts.without_gold += not np.any(example.get("gold_passages", 1))
    return counts


def _check_task(task: Any, split: str, has_passages: bool) -> None:
    if "passage_ids" in task.output_features and not has_passages:
        raise ValueError(
            f"PASSAGES_DIR and MEMORY_DIR are not set, but the examples of {task.name} name their "
            "passages by id. Set PASSAGES_DIR to the folder that they were retrieved from, or "
            "MEMORY_DIR to its memory."
        )
    if split not in task.splits:
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME: {task.name} has no {split} examples, only "
            f"{', '.join(task.splits)}. Leave it out of the mixture, or choose another split."
        )


def _check_examples(task: str, split: str, counts: _Counts, lengths: Lengths) -> None:
    if not counts.answered:
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME: no {split} example of {task} has an answer (KILT does not "
            "publish those of its test files). Choose another split, or use --run_mode=infer."
        )
    if counts.max_passages < lengths.passages:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS has K={lengths.passages} passages, but the {split} examples of "
            f"{task} have at most {counts.max_passages}. Retrieve {lengths.passages}, or lower K."
        )


def _report(
    task: str, key: str, counts: _Counts, max_cut: float, vocabulary: Vocabulary, warn: bool
) -> None:
    """Raises ValueError for too many truncated texts; logs fewer, with `warn`, and unknown tokens."""
    text, name = counts.texts[key], _TEXTS[key]
    # Passages have no limit: one of many is often too long, and rarely the one that answers.
    if key != "passages" and text.cut > max_cut * counts.examples:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS[{key!r}]={text.limit}, but {text.cut} of {counts.examples} {name} of "
            f"{task} have more tokens, the longest {text.longest}. Raise it."
        )
    if text.cut and warn:
        logger.warning(
            "TASK_FEATURE_LENGTHS[%r]: %d of %d %s of %s have more than %d tokens and are truncated; "
            "the longest has %d.",
            key, text.cut, counts.examples, name, task, text.limit, text.longest,
        )  # fmt: skip
    if text.unknown > MAX_UNKNOWN * text.tokens:
        logger.warning(
            "VOCABULARY: %.1f %% of the tokens in the %s of %s are unknown to %s. The model cannot read "
            "or write them; use a vocabulary that covers the script.",
            100 * text.unknown / text.tokens, name, task, vocabulary.path,
        )  # fmt: skip
