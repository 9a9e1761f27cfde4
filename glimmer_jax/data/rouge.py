"""Rouge-L as KILT reports it: overlap of answers that are longer than a phrase.

KILT's scores come from version 1.0.1 of the `rouge` package, whose reading of Rouge-L (Lin, 2004,
summary level) is followed here to the last bit, ties included: sentences end at full stops, words
are compared as they stand, and each distinct word counts once. The package walks back through its
table by recursion and stops at texts of about a thousand words, which answers to ELI5 can have;
here nothing recurses.
"""

from collections.abc import Sequence
from itertools import product

# Keeps the harmonic mean of two zeros defined, and the mean of two ones just below 1.
_EPSILON = 1e-8


def rouge_l(prediction: str, target: str) -> float:
    """F-score from 0 to 1 of two texts; 0.0 where one of them has nothing but full stops."""
    got, wanted = _sentences(prediction), _sentences(target)
    if not got or not wanted:
        return 0.0
    common: set[str] = set()
    for reference, sentence in product(wanted, got):
        common |= common_words(reference, sentence)
    precision = len(common) / len(set().union(*got))
    recall = len(common) / len(set().union(*wanted))
    return 2.0 * (precision * recall / (precision + recall + _EPSILON))


def common_words(reference: Sequence[str], sentence: Sequence[str]) -> set[str]:
    """Words of the longest common subsequence of two sentences.

    Of several equally long ones it is the one that ends earliest in `sentence`: which one it is
    matters, because the words of all pairs of sentences are united.
    """
    # best[j]: length, and words as a chain (last word, chain before it), of the subsequence of the
    # reference so far and of the first j words of the sentence.
    best: list[tuple[int, tuple]] = [(0, ())] * (len(sentence) + 1)
    for wanted in reference:
        above, best = best, [(0, ())]
        for j, word in enumerate(sentence):
            if word == wanted:
                length, chain = above[j]
                best.append((length + 1, (word, chain)))
            elif above[j + 1][0] > best[j][0]:
                best.append(above[j + 1])
            else:
                best.append(best[j])
    _, chain = best[-1]
    words = set()
    while chain:
        word, chain = chain
        words.add(word)
    return words


def _sentences(text: str) -> list[list[str]]:
    # A sentence of spaces alone holds one word, the empty one.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]
