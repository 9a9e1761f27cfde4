"""Training questions on passages whose names are replaced with synthetic ones in every example.

A small model trained on the real titles of a few thousand pages memorises them and does not learn
to read. Here every part of a qualified name (`json`, `dumps`) is replaced, in this example only,
with another part, a piece of the vocabulary, or a blend of two. Questions that name their page ask
about its signature, so their examples also replace the parameters and defaults of all signatures:
no slot and no claim repeats.

One mapping of words applies to titles, passages, question and answer, so that names remain
consistent. It never maps two different words that decide the answer to the same word.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glimmer_jax.kilt.examples import answers
from glimmer_jax.pydocs.signatures import CONSTANTS, parse_claim, shown_parameters, wording
from glimmer_jax.pydocs.synthetic_names import synthetic_name
from glimmer_jax.vocabulary import Vocabulary, passage_text, question_text

# The gold passage is among the first 3, so that runs with a small K see it. A synthetic answer that
# is in no passage would only add noise.
FIRST = 3
# Maximum number of mappings drawn for one example. About 1 in 20 maps two decisive words to one.
ATTEMPTS = 1000
# Number of synthetic names to choose from. The name closest in length to the old one is taken, so
# that passages, which repeat names, do not grow.
CHOICES = 3


class RenamedQuestions:
    """Questions of several tasks; each depends only on seed, stream and index."""

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Mapping[str, Any]]],
        records: Mapping[int, Mapping[str, Any]],
        num_passages: int,
        vocabulary: Vocabulary,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        num_kept: int | None = None,
    ):
        """Chooses the examples to draw from.

        Args:
          tasks: retrieved examples of each task; those with fewer than K passages, or without a
            gold passage among the first K, are dropped.
          records: passage id -> `{"title", "text"}`, with a `signature` if the text may start with
            one.
          num_passages: K.
          vocabulary: of questions, answers and passages.
          shares: relative frequency of each task; None for equal frequencies.
          seed: of all draws.
          num_kept: number of passages in an example, the gold one included; None for K.

        Raises:
          ValueError: a task has no example with K passages and a gold one among them, or names
            passages that are not in `records`.
        """
        self._tasks = {
            name: [x for x in examples if _is_answerable(x["retrieved"], num_passages)]
            for name, examples in tasks.items()
        }
        if empty := [name for name, examples in self._tasks.items() if not examples]:
            raise ValueError(
                f"No example of {', '.join(empty)} has {num_passages} retrieved passages with a gold "
                "one among them. Raise NUM_PASSAGES of --run_mode=retrieve, or lower K."
            )
        ids = (p["id"] for xs in self._tasks.values() for x in xs for p in x["retrieved"])
        if (unknown := next((i for i in ids if i not in records), None)) is not None:
            raise ValueError(
                f"DATA_DIR: the questions name passage {unknown}, which is not in the documentation of "
                "this Python. They were retrieved with another version of Python or other settings. "
                "Rerun --run_mode=passages and --run_mode=retrieve."
            )
        self._weights = [(shares or {}).get(name, 1.0) for name in self._tasks]
        self._records = records
        self._num_passages = num_passages
        self._num_kept = num_passages if num_kept is None else num_kept
        self._vocabulary = vocabulary
        self._seed = seed
        titles = {record["title"] for record in records.values()}
        parts = {part for title in titles for part in title.split(".")}
        parts |= {name for record in records.values() for name, _ in _parameters(record)}
        # All pieces of the vocabulary as well: titles of held-out modules start with pieces that no
        # training title has, and a model miscopies pieces that it never copied in training.
        parts |= set(vocabulary.words())
        self._parts = sorted(part for part in parts if re.fullmatch(r"\w+", part))

    def example(self, index: int, stream: str = "") -> dict[str, Any]:
        """Question number `index` of a stream.

        Returns:
          `inputs` and `targets` (token lists; the target ends with EOS), `passages` (K token
          lists), and `gold_passages` (K values, 0 or 1).

        Raises:
          ValueError: no mapping keeps the decisive words distinct.
        """
        draw = random.Random(f"{self._seed}:{stream}:{index}")
        task = draw.choices(list(self._tasks), self._weights)[0]
        source = draw.choice(self._tasks[task])
        retrieved = _gold_first(
            source["retrieved"][: self._num_passages], min(FIRST, self._num_kept), draw
        )[: self._num_kept]
        records = [self._records[passage["id"]] for passage in retrieved]
        subject = source["output"][0]["provenance"][0]["title"]
        titles = list(dict.fromkeys([*(record["title"] for record in records), subject]))
        answer = draw.choice(answers(source))
        pieces = wording(source["input"])
        rest = re.sub(_place(subject), "", " ".join(pieces[1::2]))
        named = re.search(_place(subject), source["input"]) is not None
        gold = next(record for record, x in zip(records, retrieved, strict=True) if x["gold"])
        decisive = _words(rest) | (set() if answer in titles else _words(answer))
        relevant = decisive | _words(gold["text"]) | _words(gold["title"])
        for _ in range(ATTEMPTS):
            mapping = _Mapping(self._parts, draw)
            new = {title: mapping.name(title) for title in titles}
            if named:
                mapping.add(_signature_words(records, source["input"]))
            # Parts may be equal, titles may not.
            distinct = len({title.lower() for title in new.values()}) == len(titles)
            if distinct and mapping.keeps_distinct(decisive, relevant):
                break
        else:
            raise ValueError(
                f"{ATTEMPTS} random mappings all gave two words of the question {source['input']!r} the "
                "same name. Remove it from the task file."
            )
        pieces[1::2] = [_replaced(x, subject, new[subject], mapping) for x in pieces[1::2]]
        target = new[answer] if answer in new else mapping.text(answer)
        encode, eos = self._vocabulary.encode, self._vocabulary.eos_id
        texts = [passage_text(new[x["title"]], mapping.text(x["text"])) for x in records]
        return {
            "inputs": encode(question_text("".join(pieces))),
            "targets": [*encode(target), eos],
            "passages": [[*encode(text), eos] for text in texts],
            "gold_passages": [int(bool(passage["gold"])) for passage in retrieved],
        }


class _Mapping:
    """Maps words to new words; words without an entry stay unchanged."""

    def __init__(self, parts: Sequence[str], draw: random.Random):
        self._parts = parts
        self._draw = draw
        self._new: dict[str, str] = {}

    def name(self, name: str) -> str:
        """A qualified name with every part replaced; equal parts get equal replacements."""
        for part in name.split("."):
            if part not in self._new:
                self._new[part] = self._synthetic(part, [*self._new.values()])
        return ".".join(self._new[part] for part in name.split("."))

    def add(self, words: Iterable[str]) -> None:
        """Adds words of signatures: names, numbers (the number of digits is kept) and constants."""
        constants = dict(zip(CONSTANTS, self._draw.sample(CONSTANTS, len(CONSTANTS)), strict=True))
        for word in words:
            if word in self._new:
                continue
            if word in constants:
                self._new.update(constants)
            elif word.isdecimal():
                self._new[word] = self._number(len(word))
            else:
                self._new[word] = self._synthetic(word, [])

    def text(self, text: str) -> str:
        """A text with every mapped word replaced."""
        return re.sub(r"\w+", lambda word: self._new.get(word[0], word[0]), text)

    def keeps_distinct(self, words: Iterable[str], others: Iterable[str]) -> bool:
        """Whether no word maps to the same as a different one of `others`, ignoring case."""
        old: dict[str, str] = {}
        for word in others:
            # Words that differ only in case count as equal.
            if old.setdefault(self._lower(word), word.lower()) != word.lower():
                old[self._lower(word)] = ""
        return all(old.get(self._lower(word), word.lower()) == word.lower() for word in words)

    def _lower(self, word: str) -> str:
        return self._new.get(word, word).lower()

    def _synthetic(self, old: str, previous: Sequence[str]) -> str:
        names: list[str] = []
        while len(names) < CHOICES:
            name = synthetic_name(self._parts, self._draw, previous)
            if name.isidentifier() and name not in CONSTANTS:
                names.append(name)
        return min(names, key=lambda name: abs(len(name) - len(old)))

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
    """Words of the signatures' parameters and defaults and of a claim's value, in order."""
    shown = [pair for record in records for pair in _parameters(record)]
    if (claim := parse_claim(question)) is not None:
        relation, _, value = claim
        shown.append(("", value) if relation.startswith("default") else (value, None))
    names = {name for name, _ in shown}
    words = [word for pair in shown for text in pair for word in re.findall(r"\w+", text or "")]
    # Single letters in defaults are prefixes (`b''`) and escapes (`\\n`), not names.
    return [
        word for word in dict.fromkeys(words) if len(word) > 1 or word.isdecimal() or word in names
    ]


def _is_answerable(retrieved: Sequence[Mapping[str, Any]], num_passages: int) -> bool:
    first = retrieved[:num_passages]
    return len(first) == num_passages and any(passage["gold"] for passage in first)


def _gold_first(retrieved: Sequence[Any], first: int, draw: random.Random) -> list[Any]:
    """The passages in order, with the gold passage swapped into the first `first` if necessary."""
    ordered = list(retrieved)
    rank = next(i for i, passage in enumerate(ordered) if passage["gold"])
    if rank >= first:
        target = draw.randrange(first)
        ordered[rank], ordered[target] = ordered[target], ordered[rank]
    return ordered


def _place(name: str) -> str:
    return rf"(?<![\w.]){re.escape(name)}(?!\w)"


def _replaced(text: str, title: str, new: str, mapping: _Mapping) -> str:
    return new.join(mapping.text(part) for part in re.split(_place(title), text))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))
