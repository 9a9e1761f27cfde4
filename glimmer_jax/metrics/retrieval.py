"""Recall of passages and of pages in retrieved files.

A passage is relevant if it covers a gold paragraph (`gold` in the retrieved file). KILT's own
scores (`glimmer_jax.metrics.kilt`) count pages: R-precision, and recall@k of complete sets of
pages.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glimmer_jax.kilt.examples import provenance
from glimmer_jax.metrics.kilt import retrieval_scores
from glimmer_jax.metrics.kilt_predictions import Guess, parse_gold
from glimmer_jax.metrics.qa import recall_of

Example = Mapping[str, Any]


def recall(examples: Sequence[Example], at: Sequence[int]) -> dict[str, float]:
    """`recall_at_N`, from 0 to 1, over examples with provenance, and their number `questions`."""
    labelled = [example for example in examples if provenance(example)]
    result: dict[str, float] = {"questions": len(labelled)}
    for n in at:
        hits = sum(any(x["gold"] for x in example["retrieved"][:n]) for example in labelled)
        result[f"recall_at_{n}"] = hits / max(len(labelled), 1)
    return result


def mean_recall(files: Sequence[Sequence[Example]], at: Sequence[int]) -> dict[str, float]:
    """The mean of `recall` over files."""
    rows = [recall(examples, at) for examples in files]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def format_report(report: Mapping[str, Mapping[str, float]]) -> str:
    """Formats a report as a table with one row per file."""
    columns = list(dict.fromkeys(name for row in report.values() for name in row))
    width = max(len(name) for name in report)
    lines = [" " * width + "".join(f"  {name.replace('recall_at_', 'R@'):>9}" for name in columns)]
    for name, row in report.items():
        cells = (f"  {row[c]:9.3f}" if c != "questions" else f"  {int(row[c]):9d}" for c in columns)
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


KS = (1, 5, 20, 40, 100)


class RetrievalScores:
    """Running means over the questions of a file, in constant memory."""

    def __init__(self, ks: Sequence[int] = KS):
        self._ks = ks
        self._passages: defaultdict[str, float] = defaultdict(float)
        self._pages: defaultdict[str, float] = defaultdict(float)
        self._has_gold_pages = False

    def add(self, example: Mapping[str, Any], pages: Sequence[str] | None) -> None:
        """Adds a question.

        Args:
          example: with `retrieved`.
          pages: of the retrieved passages, best first, with repetitions; None for a corpus without
            pages.

        Raises:
          ValueError: gold output that is not in KILT's format.
        """
        if provenance(example):
            marks = [passage["gold"] for passage in example["retrieved"]]
            self._passages["questions"] += 1
            for k in self._ks:
                self._passages[f"recall_at_{k}"] += recall_of(marks, k)
        self._has_gold_pages |= any(place.get("wikipedia_id") for place in provenance(example))
        if pages is not None and example.get("output"):
            where = f"Example {example['id']!r}"
            guess = Guess(where, None, tuple(dict.fromkeys(pages)))
            page_scores = retrieval_scores(parse_gold(dict(example), where), guess, self._ks)
            self._pages["questions"] += 1
            for name in ("Rprec", *(f"recall@{k}" for k in self._ks if k > 1)):
                self._pages[name] += page_scores[name]

    def passages(self) -> dict[str, float]:
        """`recall_at_K` over questions with provenance, and their number `questions`."""
        return _means(self._passages)

    def pages(self) -> dict[str, float]:
        """KILT's `Rprec` and `recall@K`, and the number of `questions`.

        Empty without pages, in the corpus or in all provenance: KILT compares their ids alone.
        """
        return _means(self._pages) if self._has_gold_pages else {}


def _means(totals: Mapping[str, float]) -> dict[str, float]:
    count = totals.get("questions", 0)
    return {name: x if name == "questions" else x / count for name, x in totals.items()}
