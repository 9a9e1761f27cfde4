"""Reading exercises: a curriculum for models trained from scratch, before they see real questions.

A small model trained on real questions from the start memorises the few thousand titles and does
not learn to read. In these exercises every example has new synthetic titles, so the answer can only
be copied from the passage that matches the question. There are two exercises, on any plain text:

    which   a clause of one passage               -> that passage's title
    spans   a clause with words missing (T5's span corruption, arXiv 1910.10683, section 3.1.4, with
            the uncorrupted text among the passages)  -> the words

A curriculum is a sequence of stages: first few short passages, from which copying and matching
emerge, then more and longer passages, with similar passages and noise.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from glimmer_jax.vocabulary import Vocabulary, passage_text, question_text


@dataclasses.dataclass(frozen=True)
class Stage:
    """Difficulty of the exercises of one stage. Raises ValueError for values out of range."""

    passages: int  # K, including the gold passage
    passage_words: tuple[int, int]  # minimum and maximum number of words of a passage
    clause_words: tuple[int, int]  # minimum and maximum number of words of a question
    dropped: float = 0.0  # share of a clause's words that are dropped
    spans: float = 0.0  # share of exercises of the kind `spans`
    synthetic_titles: float = 1.0  # share of examples with synthetic titles
    siblings: float = 0.0  # share of the other passages that come from the gold passage's module

    def __post_init__(self):
        if self.passages < 1:
            raise ValueError(f"passages must be at least 1, got {self.passages}.")
        for name in ("passage_words", "clause_words"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(
                    f"{name} must be (minimum, maximum) with 1 <= minimum <= maximum, got "
                    f"{(low, high)}."
                )
        for name in ("dropped", "spans", "synthetic_titles", "siblings"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")


class Exercises:
    """Exercises on a set of passages; each depends only on seed, stream and index."""

    def __init__(
        self, records: Sequence[dict[str, Any]], stage: Stage, vocabulary: Vocabulary, seed: int = 0
    ):
        """Chooses the passages to draw from.

        Args:
          records: passages with `title`, `text` and `module`; short ones are not used.
          stage: difficulty.
          vocabulary: of questions, answers and passages.
          seed: of all draws.

        Raises:
          ValueError: fewer than K passages are long enough.
        """
        min_words = stage.clause_words[0] + 2
        self._texts = [(r["title"], r["text"].split(), r["module"]) for r in records]
        self._eligible = [
            i for i, (_, words, _) in enumerate(self._texts) if len(words) >= min_words
        ]
        if len(self._eligible) < stage.passages:
            raise ValueError(
                f"An exercise needs {stage.passages} passages of at least {min_words} words, but only "
                f"{len(self._eligible)} are that long. Use more text, shorter clauses or fewer passages."
            )
        self._by_module: dict[str, list[int]] = {}
        for i in self._eligible:
            self._by_module.setdefault(self._texts[i][2], []).append(i)
        titles = [title for title, _, _ in self._texts]
        self._parts = sorted({p for title in titles for p in re.split(r"[._]", title) if p})
        self._stage = stage
        self._vocabulary = vocabulary
        self._seed = seed

    def example(self, index: int, stream: str = "") -> dict[str, Any]:
        """Exercise number `index` of a stream.

        Returns:
          `inputs` and `targets` (token lists; the target ends with EOS), `passages` (K token
          lists), and `gold_passages` (K values, 0 or 1).
        """
        draw = random.Random(f"{self._seed}:{stream}:{index}")
        stage = self._stage
        gold = draw.choice(self._eligible)
        chosen = [gold]
        siblings = self._by_module[self._texts[gold][2]]
        while len(chosen) < stage.passages:
            sibling = draw.random() < stage.siblings and len(siblings) > stage.passages
            other = draw.choice(siblings if sibling else self._eligible)
            if other not in chosen:
                chosen.append(other)
        synthetic = draw.random() < stage.synthetic_titles
        titles = [self._synthetic_title(draw) if synthetic else self._texts[i][0] for i in chosen]
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

    def _synthetic_title(self, draw: random.Random) -> str:
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
        """Removes one or two spans of one to three words from a clause of at least two words."""
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
