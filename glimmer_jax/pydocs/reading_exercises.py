"""Reading exercises: what a model from scratch must practise before real questions teach it anything.

A small model given real questions at once learns the few thousand titles by heart and reads nothing.
Here titles are made up anew for every example, so that an answer can only be copied from the passage
that the question points to. Two exercises on any plain text:

    which   a clause of one passage               -> that passage's title
    spans   a clause with words missing (T5's span corruption, arXiv 1910.10683, section 3.1.4, with
            the uncorrupted text among the passages)  -> the words

A course is a row of stages: few short passages first, so that copying and matching appear, then more
and longer ones, with look-alikes and noise.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from glimmer_jax.vocabulary import Vocabulary, passage_text, question_text


@dataclasses.dataclass(frozen=True)
class Stage:
    """How hard the exercises of one stage are."""

    passages: int  # K, the one in question and others
    passage_words: tuple[int, int]  # least and most words of a passage
    clause_words: tuple[int, int]  # least and most words of a question
    dropped: float = 0.0  # share of a clause's words that is left out
    spans: float = 0.0  # share of exercises of the kind `spans`
    made_up_titles: float = 1.0  # share of examples whose titles are made up
    siblings: float = 0.0  # share of the other passages that come from the same module

    def __post_init__(self):
        if self.passages < 1:
            raise ValueError(f"passages must be at least 1, got {self.passages}.")
        for name in ("passage_words", "clause_words"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be (least, most) with 1 <= least <= most.")
        for name in ("dropped", "spans", "made_up_titles", "siblings"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")


class Exercises:
    """Exercises on a set of passages, each a function of seed, stream and index alone."""

    def __init__(
        self, records: Sequence[dict[str, Any]], stage: Stage, vocabulary: Vocabulary, seed: int = 0
    ):
        """`records` have `title`, `text` and `module`; only those of enough words are asked of."""
        least = stage.clause_words[0] + 2
        self._texts = [(r["title"], r["text"].split(), r["module"]) for r in records]
        self._asked = [i for i, (_, words, _) in enumerate(self._texts) if len(words) >= least]
        if len(self._asked) < stage.passages:
            raise ValueError(
                f"{len(self._asked)} passages have {least} words, the least that a clause of "
                f"{stage.clause_words[0]} words is cut from, and an exercise takes {stage.passages}. "
                "Give more text, shorter clauses or fewer passages."
            )
        self._by_module: dict[str, list[int]] = {}
        for i in self._asked:
            self._by_module.setdefault(self._texts[i][2], []).append(i)
        titles = [title for title, _, _ in self._texts]
        self._parts = sorted({p for title in titles for p in re.split(r"[._]", title) if p})
        self._stage = stage
        self._vocabulary = vocabulary
        self._seed = seed

    def example(self, index: int, stream: str = "") -> dict[str, Any]:
        """One exercise, number `index` of the stream.

        Returns:
          `inputs` and `targets` (token lists, the target ended), `passages` (K token lists), and
          `gold_passages` (K times 0 or 1).
        """
        draw = random.Random(f"{self._seed}:{stream}:{index}")
        stage = self._stage
        gold = draw.choice(self._asked)
        chosen = [gold]
        siblings = self._by_module[self._texts[gold][2]]
        while len(chosen) < stage.passages:
            sibling = draw.random() < stage.siblings and len(siblings) > stage.passages
            other = draw.choice(siblings if sibling else self._asked)
            if other not in chosen:
                chosen.append(other)
        made_up = draw.random() < stage.made_up_titles
        titles = [self._made_up_title(draw) if made_up else self._texts[i][0] for i in chosen]
        windows = [self._window(self._texts[i][1], draw) for i in chosen]
        clause = self._clause(windows[0], titles[0], draw)
        question, answer = " ".join(clause), titles[0]
        if draw.random() < stage.spans:
            question, answer = self._corrupt(clause, draw)
        order = list(range(stage.passages))
        draw.shuffle(order)
        encode, eos = self._vocabulary.encode, self._vocabulary.eos_id
        texts = [passage_text(titles[i], " ".join(windows[i])) for i in order]
        return {
            "inputs": self._encode(question_text(question)),
            "targets": [*self._encode(answer), eos],
            "passages": [[*encode(text), eos] for text in texts],
            "gold_passages": [int(i == 0) for i in order],
        }

    def _made_up_title(self, draw: random.Random) -> str:
        names = [
            "_".join(draw.choice(self._parts) for _ in range(draw.choice((1, 1, 2))))
            for _ in range(draw.choice((2, 2, 3)))
        ]
        return ".".join(names)

    def _window(self, words: list[str], draw: random.Random) -> list[str]:
        length = draw.randint(*self._stage.passage_words)
        start = draw.randint(0, max(0, len(words) - length))
        return words[start : start + length]

    def _clause(self, words: list[str], title: str, draw: random.Random) -> list[str]:
        parts = {part.lower() for part in re.split(r"[._]", title)}
        length = draw.randint(*self._stage.clause_words)
        start = draw.randint(0, max(0, len(words) - length))
        clause = words[start : start + length]
        kept = [
            word
            for word in clause
            if draw.random() >= self._stage.dropped
            and parts.isdisjoint(re.split(r"\W+", word.lower()))
        ]
        return kept or clause

    def _corrupt(self, clause: list[str], draw: random.Random) -> tuple[str, str]:
        """Takes one or two spans of one to three words out of a clause of at least two."""
        question, answer, place = [], [], 0
        starts = sorted(draw.sample(range(len(clause)), min(len(clause) - 1, draw.choice((1, 2)))))
        for number, start in enumerate(starts):
            if start < place:
                continue
            end = min(len(clause), start + draw.choice((1, 2, 2, 3)))
            mark = f"<extra_id_{number}>"
            question += [*clause[place:start], mark]
            answer += [mark, *clause[start:end]]
            place = end
        question += clause[place:]
        return " ".join(question), " ".join(answer)

    def _encode(self, text: str) -> list[int]:
        """Token ids; `<extra_id_n>` becomes its sentinel."""
        ids: list[int] = []
        for i, piece in enumerate(re.split(r"<extra_id_(\d+)>", text)):
            if i % 2:
                ids.append(self._vocabulary.sentinel(int(piece)))
            elif piece.strip():
                ids += self._vocabulary.encode(piece.strip())
        return ids
