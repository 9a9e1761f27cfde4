"""Clauses of docstrings, as questions with one answer and as claims.

A clause never contains its object's name or a part of it. A question is a short phrase of common
words that occurs in exactly one passage. Many passages contain the same words, so word overlap
often misleads; only the order of the words identifies the passage.
"""

import math
import random
import re
from collections import defaultdict

from glimmer_jax.pydocs.corpus import Page, stable_hash

MIN_WORDS, MAX_WORDS = 5, 6
# Maximum number of words of a claim about a docstring, so that claims fit into a question's tokens.
CLAIM_WORDS = 8
# Random noise, in nats, added to the rarity of a clause; clauses of the most common words are
# chosen.
JITTER = 1.0

Claim = tuple[Page, str, int, bool]


def clean_words(sentence: str) -> list[str]:
    """Words without leading and trailing punctuation; words of punctuation only are dropped."""
    stripped = (word.strip(".,;:!?\"'`()[]{}<>*|") for word in sentence.split())
    return [word for word in stripped if re.search(r"\w", word)]


def name_parts(name: str) -> frozenset[str]:
    """`http.HTTPServer.server_bind` -> http, server, bind, httpserver (lower case)."""
    parts = set()
    for piece in re.split(r"[._]", name):
        parts.add(piece.lower())
        parts.update(x.lower() for x in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", piece))
    return frozenset(part for part in parts if len(part) > 1)


def reveals(word: str, parts: frozenset[str]) -> bool:
    """Whether a word contains a part of the name, or is an inflection of one (`joined` for join)."""
    for piece in name_parts(word) | {word.lower()}:
        for part in parts:
            if piece == part or (len(part) > 2 and part in piece):
                return True
            if len(piece) > 3 and (part.startswith(piece) or piece[:-1] == part[: len(piece) - 1]):
                return True
    return False


class ClauseIndex:
    """An index of words, to find the passages that contain a clause."""

    def __init__(self, pages: tuple[Page, ...]) -> None:
        self._words: list[list[str]] = []
        self._keys: list[tuple[str, int]] = []
        self._holders: dict[str, set[int]] = defaultdict(set)
        for page in pages:
            for chunk in range(len(page.chunks)):
                row = len(self._words)
                words = [word.lower() for word in clean_words(page.text(chunk))]
                self._words.append(words)
                self._keys.append((page.name, chunk))
                for word in words:
                    self._holders[word].add(row)

        total = len(self._words)
        # -log of the share of passages that contain the word.
        self._rarity = {word: math.log(total / len(rows)) for word, rows in self._holders.items()}

    def rarity(self, word: str) -> float:
        """Rarity of a word in nats: 0 if every passage contains it. Raises KeyError if none does."""
        return self._rarity[word.lower()]

    def holders(self, clause: list[str], span: int) -> set[tuple[str, int]]:
        """(page, chunk) of the passages that contain the words in order within `span` words."""
        words = [word.lower() for word in clause]
        rows = set.intersection(*sorted((self._holders[word] for word in words), key=len))
        return {self._keys[row] for row in rows if _in_order(words, self._words[row], span)}


def _in_order(words: list[str], text: list[str], limit: int) -> bool:
    for start, word in enumerate(text):
        if word != words[0]:
            continue
        place = start
        for other in words[1:]:
            try:
                place = text.index(other, place + 1, start + limit)
            except ValueError:
                break
        else:
            return True
    return False


def common_clauses(
    page: Page, index: ClauseIndex, count: int, per_sentence: int
) -> list[tuple[int, str]]:
    """Questions of a page as (chunk, clause); each clause occurs in this passage only.

    Args:
      page: the page.
      index: of all passages.
      count: maximum number of questions; those with the most common words are chosen.
      per_sentence: maximum number of questions from one sentence.
    """
    parts = name_parts(page.name)
    fragments = []
    for chunk, sentences in enumerate(page.chunks):
        for number, sentence in enumerate(sentences):
            # Seeded by name, so that a page's draws do not depend on other pages.
            draw = random.Random(stable_hash("clauses", page.name, chunk, number))
            words = clean_words(sentence)
            usable = [place for place, word in enumerate(words) if not reveals(word, parts)]
            rarity = [index.rarity(word) for word in words]
            for length in range(MIN_WORDS, MAX_WORDS + 1):
                for start in range(len(usable) - length + 1):
                    places = usable[start : start + length]
                    clause = [words[place] for place in places]
                    ease = sum(rarity[place] for place in places) + JITTER * draw.random()
                    span = places[-1] - places[0] + 1
                    fragments.append((ease / length, chunk, number, clause, span))
    chosen: dict[str, int] = {}
    used: dict[tuple[int, int], int] = defaultdict(int)
    for _, chunk, number, clause, span in sorted(fragments):
        if len(chosen) == count:
            break
        text = " ".join(clause)
        if used[chunk, number] == per_sentence or text in chosen:
            continue
        if index.holders(clause, span) == {(page.name, chunk)}:
            used[chunk, number] += 1
            chosen[text] = chunk
    return [(chunk, text) for text, chunk in chosen.items()]


def clause_pairs(pages: tuple[Page, ...]) -> list[list[Claim]]:
    """Four claims for each pair of siblings: each clause about its own object and about the other.

    Only pages of one passage are used, since the passage then holds the page's complete
    documentation.
    """
    groups: dict[str, list[Page]] = defaultdict(list)
    for page in pages:
        if len(page.chunks) == 1 and page.chunks[0] and page.documented.kind != "module":
            groups[page.name.rpartition(".")[0] or page.documented.module].append(page)
    pairs = []
    for siblings in groups.values():
        siblings.sort(key=lambda page: stable_hash("sibling", page.name))
        for left, right in zip(siblings[::2], siblings[1::2], strict=False):
            pairs.append(_swap(left, right))
    return [pair for pair in pairs if pair]


def _swap(left: Page, right: Page) -> list[Claim]:
    parts = name_parts(left.name) | name_parts(right.name)
    candidates = [
        [word for word in clean_words(page.chunks[0][0]) if not reveals(word, parts)][:CLAIM_WORDS]
        for page in (left, right)
    ]
    if min(len(words) for words in candidates) < 4 or candidates[0] == candidates[1]:
        return []
    texts = [set(clean_words(page.text(0).lower())) for page in (left, right)]
    for words, other in zip(candidates, reversed(texts), strict=True):
        # The other's documentation contains too many of these words to call the claim false there.
        if sum(word.lower() in other for word in words) > 0.6 * len(words):
            return []
    clauses = [" ".join(words) for words in candidates]
    return [
        (page, f"{page.name}: {clause}.", 0, page is owner)
        for page in (left, right)
        for owner, clause in zip((left, right), clauses, strict=True)
    ]
