"""Training questions on passages whose titles are made up anew for every example.

A small model given the real titles of a few thousand pages learns them by heart and reads nothing.
Here every part of a qualified name (`json`, `dumps`) is exchanged, for this example alone, for another
one or a piece of the vocabulary, often a blend of two: in the titles, wherever it stands as a word in
the passages, in the question and in the answer.
Siblings stay siblings, a text still speaks of its own title, and what is left to learn is to read.

Names made up from the parts of real ones, for exercises that only reading can solve.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glimmer_jax.kilt.examples import answers
from glimmer_jax.vocabulary import Vocabulary, passage_text, question_text

# The gold passage is among that many, for runs with a small K. A made-up answer that no passage tells
# cannot be known, and what it would teach is noise.
FIRST = 3


class RenamedQuestions:
    """Questions of several tasks, each a function of seed and index alone."""

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Mapping[str, Any]]],
        records: Mapping[int, Mapping[str, Any]],
        num_passages: int,
        vocabulary: Vocabulary,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        """Args:
          tasks: retrieved examples of each task; those with fewer passages, or without a gold one among
            the first K, are left out.
          records: passage id -> `{"title", "text"}`.
          num_passages: K.
          vocabulary: of questions, answers and passages.
          shares: how often each task is drawn; None for equally often.
          seed: of all draws.

        Raises ValueError where a task has no example with K passages, a gold one among them, or names
        passages that are not in `records`.
        """
        self._tasks = {
            name: [one for one in examples if _is_told(one["retrieved"], num_passages)]
            for name, examples in tasks.items()
        }
        if empty := [name for name, examples in self._tasks.items() if not examples]:
            raise ValueError(
                f"No example of {', '.join(empty)} has {num_passages} retrieved passages with a gold "
                "one among them. Retrieve more (NUM_PASSAGES) or take fewer."
            )
        named = (p["id"] for some in self._tasks.values() for one in some for p in one["retrieved"])
        if (unknown := next((i for i in named if i not in records), None)) is not None:
            raise ValueError(
                f"The questions name passage {unknown}, which this Python's documentation does not have: "
                "they were retrieved with another version of Python, or with other settings. Write "
                "passages and retrieved files anew (--run_mode=passages, --run_mode=retrieve)."
            )
        self._weights = [(shares or {}).get(name, 1.0) for name in self._tasks]
        self._records = records
        self._num_passages = num_passages
        self._vocabulary = vocabulary
        self._seed = seed
        titles = {record["title"] for record in records.values()}
        parts = {part for title in titles for part in title.split(".")}
        # And every piece of the vocabulary: titles never seen begin with pieces that no training title
        # has, and what was never copied is miscopied.
        self._parts = sorted(parts | set(vocabulary.words()))

    def example(self, index: int) -> dict[str, Any]:
        """One question.

        Returns:
          `inputs` and `targets` (token lists, the target ended), `passages` (K token lists), and
          `gold_passages` (K times 0 or 1).
        """
        draw = random.Random(f"{self._seed}:{index}")
        task = draw.choices(list(self._tasks), self._weights)[0]
        asked = draw.choice(self._tasks[task])
        retrieved = _gold_first(asked["retrieved"][: self._num_passages], draw)
        records = [self._records[one["id"]] for one in retrieved]
        about = asked["output"][0]["provenance"][0]["title"]
        titles = list(dict.fromkeys([*(record["title"] for record in records), about]))
        new: dict[str, str] = {}
        # Parts may repeat, titles may not.
        while len(set(new.values())) < len(titles):
            exchange = _Exchange(self._parts, draw)
            new = {title: exchange(title) for title in titles}
        answer = draw.choice(answers(asked))
        encode, eos = self._vocabulary.encode, self._vocabulary.eos_id
        texts = [passage_text(new[one["title"]], exchange.words(one["text"])) for one in records]
        return {
            "inputs": encode(question_text(_replaced(asked["input"], about, new[about]))),
            "targets": [*encode(new.get(answer, answer)), eos],
            "passages": [[*encode(text), eos] for text in texts],
            "gold_passages": [int(bool(one["gold"])) for one in retrieved],
        }


class _Exchange:
    """Names with every part exchanged, the same part for the same one."""

    def __init__(self, parts: Sequence[str], draw: random.Random):
        self._parts = parts
        self._draw = draw
        self._new: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        return ".".join(self._part(part) for part in name.split("."))

    def words(self, text: str) -> str:
        """The text with every word exchanged that is a part of a name exchanged before."""
        return re.sub(r"\w+", lambda word: self._new.get(word[0], word[0]), text)

    def _part(self, part: str) -> str:
        if part not in self._new:
            self._new[part] = made_up_name(self._parts, self._draw, [*self._new.values()])
        return self._new[part]


def _is_told(retrieved: Sequence[Mapping[str, Any]], num_passages: int) -> bool:
    first = retrieved[:num_passages]
    return len(first) == num_passages and any(one["gold"] for one in first)


def _gold_first(retrieved: Sequence[Any], draw: random.Random) -> list[Any]:
    """The retriever's order, with a gold passage that lies behind the first `FIRST` changed into them."""
    placed = list(retrieved)
    found = next(i for i, one in enumerate(placed) if one["gold"])
    if found >= FIRST:
        place = draw.randrange(FIRST)
        placed[found], placed[place] = placed[place], placed[found]
    return placed


def _replaced(question: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w])", lambda _: new, question)


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
