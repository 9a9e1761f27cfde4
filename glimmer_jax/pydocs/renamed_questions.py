"""Training questions on passages whose names are made up for every example.

A small model given the real titles of a few thousand pages learns them by heart and reads nothing.
Here every part of a qualified name (`json`, `dumps`) is replaced, for this example alone, by another
part, by a piece of the vocabulary or by a blend of two. Questions that name their page ask about its
signature, so there the parameters and defaults of all signatures are replaced as well: no slot and no
claim repeats. One mapping of words serves titles, passages, question and answer, and it never makes
two words one that decide the answer. Siblings stay siblings, a text still speaks of its own title,
and reading is all that is left to learn.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glimmer_jax.kilt.examples import answers
from glimmer_jax.pydocs.signatures import CONSTANTS, parse_claim, shown_parameters, wording
from glimmer_jax.pydocs.synthetic_names import made_up_name
from glimmer_jax.vocabulary import Vocabulary, passage_text, question_text

# The gold passage is among that many, for runs with a small K. A made-up answer that no passage tells
# cannot be known, and what it would teach is noise.
FIRST = 3
# Mappings drawn for one example until one keeps apart what decides the answer; about 1 in 20 does not.
ATTEMPTS = 1000
# Of as many made-up names that one is taken whose length is nearest to the old name's: names stand in
# several places of a passage, and passages should not grow.
CHOICES = 3


class RenamedQuestions:
    """Questions of several tasks, each a function of seed, stream and index alone."""

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Mapping[str, Any]]],
        records: Mapping[int, Mapping[str, Any]],
        num_passages: int,
        vocabulary: Vocabulary,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        given: int | None = None,
    ):
        """Args:
          tasks: retrieved examples of each task; those with fewer passages, or without a gold one among
            the first K, are left out.
          records: passage id -> `{"title", "text"}`, with a `signature` where the text may start
            with one.
          num_passages: K.
          vocabulary: of questions, answers and passages.
          shares: how often each task is drawn; None for equally often.
          seed: of all draws.
          given: an example holds this many of the K; 1 is the gold passage alone. None for all.

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
        self._given = num_passages if given is None else given
        self._vocabulary = vocabulary
        self._seed = seed
        titles = {record["title"] for record in records.values()}
        parts = {part for title in titles for part in title.split(".")}
        parts |= {name for record in records.values() for name, _ in _parameters(record)}
        # And every piece of the vocabulary: titles never seen begin with pieces that no training title
        # has, and what was never copied is miscopied.
        parts |= set(vocabulary.words())
        self._parts = sorted(part for part in parts if re.fullmatch(r"\w+", part))

    def example(self, index: int, stream: str = "") -> dict[str, Any]:
        """Question number `index` of the stream.

        Returns:
          `inputs` and `targets` (token lists, the target ended), `passages` (K token lists), and
          `gold_passages` (K times 0 or 1).

        Raises:
          ValueError: no mapping keeps the question's words apart.
        """
        draw = random.Random(f"{self._seed}:{stream}:{index}")
        task = draw.choices(list(self._tasks), self._weights)[0]
        asked = draw.choice(self._tasks[task])
        retrieved = _gold_first(
            asked["retrieved"][: self._num_passages], min(FIRST, self._given), draw
        )[: self._given]
        records = [self._records[one["id"]] for one in retrieved]
        about = asked["output"][0]["provenance"][0]["title"]
        titles = list(dict.fromkeys([*(record["title"] for record in records), about]))
        answer = draw.choice(answers(asked))
        pieces = wording(asked["input"])
        rest = re.sub(_place(about), "", " ".join(pieces[1::2]))
        named = re.search(_place(about), asked["input"]) is not None
        gold = next(record for record, one in zip(records, retrieved, strict=True) if one["gold"])
        decisive = _words(rest) | (set() if answer in titles else _words(answer))
        told = decisive | _words(gold["text"]) | _words(gold["title"])
        for _ in range(ATTEMPTS):
            mapping = _Mapping(self._parts, draw)
            new = {title: mapping.name(title) for title in titles}
            if named:
                mapping.add(_signature_words(records, asked["input"]))
            # Parts may repeat, titles may not.
            distinct = len({title.lower() for title in new.values()}) == len(titles)
            if distinct and mapping.keeps_apart(decisive, told):
                break
        else:
            raise ValueError(
                f"{ATTEMPTS} random renamings of the question {asked['input']!r} all gave two of its "
                "words one name. Leave it out of the task file."
            )
        pieces[1::2] = [_replaced(piece, about, new[about], mapping) for piece in pieces[1::2]]
        target = new[answer] if answer in new else mapping.text(answer)
        encode, eos = self._vocabulary.encode, self._vocabulary.eos_id
        texts = [passage_text(new[one["title"]], mapping.text(one["text"])) for one in records]
        return {
            "inputs": encode(question_text("".join(pieces))),
            "targets": [*encode(target), eos],
            "passages": [[*encode(text), eos] for text in texts],
            "gold_passages": [int(bool(one["gold"])) for one in retrieved],
        }


class _Mapping:
    """New words for old ones; a word without a new one stays."""

    def __init__(self, parts: Sequence[str], draw: random.Random):
        self._parts = parts
        self._draw = draw
        self._new: dict[str, str] = {}

    def name(self, name: str) -> str:
        """A qualified name with every part replaced, the same part always by the same one."""
        for part in name.split("."):
            if part not in self._new:
                self._new[part] = self._made_up(part, [*self._new.values()])
        return ".".join(self._new[part] for part in name.split("."))

    def add(self, words: Iterable[str]) -> None:
        """Gives new words to those of signatures: names, numbers of as many digits, constants."""
        constants = dict(zip(CONSTANTS, self._draw.sample(CONSTANTS, len(CONSTANTS)), strict=True))
        for word in words:
            if word in self._new:
                continue
            if word in constants:
                self._new.update(constants)
            elif word.isdecimal():
                self._new[word] = self._number(len(word))
            else:
                self._new[word] = self._made_up(word, [])

    def text(self, text: str) -> str:
        """A text with every word replaced that has a new one."""
        return re.sub(r"\w+", lambda word: self._new.get(word[0], word[0]), text)

    def keeps_apart(self, words: Iterable[str], others: Iterable[str]) -> bool:
        """Whether none of `words` turns into the same as another of `others`, in any capitals."""
        old: dict[str, str] = {}
        for word in others:
            # What differs in capitals alone was one before.
            if old.setdefault(self._lower(word), word.lower()) != word.lower():
                old[self._lower(word)] = ""
        return all(old.get(self._lower(word), word.lower()) == word.lower() for word in words)

    def _lower(self, word: str) -> str:
        return self._new.get(word, word).lower()

    def _made_up(self, old: str, before: Sequence[str]) -> str:
        made: list[str] = []
        while len(made) < CHOICES:
            name = made_up_name(self._parts, self._draw, before)
            if name.isidentifier() and name not in CONSTANTS:
                made.append(name)
        return min(made, key=lambda name: abs(len(name) - len(old)))

    def _number(self, digits: int) -> str:
        first = 0 if digits == 1 else 10 ** (digits - 1)
        return str(self._draw.randrange(first, 10**digits))


def _parameters(record: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """(name, default or None) of the signature that a record's text starts with."""
    signature = record.get("signature", "")
    if not signature or not record["text"].startswith(signature):
        return []
    return shown_parameters(signature)


def _signature_words(records: Sequence[Mapping[str, Any]], question: str) -> list[str]:
    """Words of the signatures' parameters and defaults, and of a claim's value, in order."""
    shown = [pair for record in records for pair in _parameters(record)]
    if (claim := parse_claim(question)) is not None:
        relation, _, value = claim
        shown.append(("", value) if relation.startswith("default") else (value, None))
    names = {name for name, _ in shown}
    found = [word for pair in shown for text in pair for word in re.findall(r"\w+", text or "")]
    # Single letters in defaults are prefixes (`b''`) and escapes (`\\n`), not names.
    return [
        word for word in dict.fromkeys(found) if len(word) > 1 or word.isdecimal() or word in names
    ]


def _is_told(retrieved: Sequence[Mapping[str, Any]], num_passages: int) -> bool:
    first = retrieved[:num_passages]
    return len(first) == num_passages and any(one["gold"] for one in first)


def _gold_first(retrieved: Sequence[Any], first: int, draw: random.Random) -> list[Any]:
    """The retriever's order, with a gold passage that lies behind the first `first` changed into them."""
    placed = list(retrieved)
    found = next(i for i, one in enumerate(placed) if one["gold"])
    if found >= first:
        place = draw.randrange(first)
        placed[found], placed[place] = placed[place], placed[found]
    return placed


def _place(name: str) -> str:
    return rf"(?<![\w.]){re.escape(name)}(?!\w)"


def _replaced(text: str, about: str, new: str, mapping: _Mapping) -> str:
    return new.join(mapping.text(part) for part in re.split(_place(about), text))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))
