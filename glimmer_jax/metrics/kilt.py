"""KILT's official scores of a guess file against a gold file, bit for bit.

Metrics of the KILT benchmark (Petroni et al., arXiv 2009.02252, section 5), with the keys and
values of its scripts `eval_downstream.py` and `eval_retrieval.py`, so that numbers are comparable
with the leaderboard. `answer_in_context@k` of the retrieval script is omitted, since no leaderboard
reports it. Differences from `glimmer_jax.metrics.qa`, each with a test: accuracy compares case and
punctuation, an answer of articles only has F1 0, and recall@k counts sets of pages.

Rouge-L (Lin, 2004, summary level) equals version 1.0.1 of the `rouge` package, which KILT's scripts
call, including its tie-breaking: sentences end at full stops, words are compared unchanged, and
each distinct word counts once. The package itself is not used, because it recurses once per word
and raises RecursionError for ELI5's answers of about a thousand words.

`glimmer_jax.metrics.kilt_predictions` reads the files; this module scores its result.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from glimmer_jax.metrics.kilt_predictions import Gold, Guess, read_pairs
from glimmer_jax.metrics.qa import normalize_answer
from glimmer_jax.runtime.preemption import STOP

Pairs = Sequence[tuple[Gold, Guess]]
Scores = dict[str, float]

KS = (1, 5, 10, 20)
ANSWER_METRICS = ("accuracy", "em", "f1", "rougel")
# What seqio's tasks call them.
_TASK_METRICS = {"accuracy": "accuracy", "exact_match": "em", "f1": "f1", "rougel": "rougel"}


def kilt_scores(
    gold_path: str | Path, guess_path: str | Path, ks: Sequence[int] = KS
) -> dict[str, dict | None]:
    """The results of both scripts, `{"downstream": downstream(…), "retrieval": retrieval(…)}`.

    Args:
      gold_path: labelled gold file, JSON Lines.
      guess_path: guess file, JSON Lines.
      ks: numbers of pages for precision@k, recall@k and success_rate@k.

    Returns:
      `downstream` is None if no guess has an answer (retrieval only).

    Raises:
      ValueError: `ks` are not distinct positive numbers, or a file is invalid (`read_pairs`).
    """
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f"ks must be distinct positive numbers, such as 1,5,20, got {list(ks)}.")
    pairs = read_pairs(gold_path, guess_path)
    answered = any(guess.answer is not None for _, guess in pairs)
    return {
        "downstream": downstream(pairs) if answered else None,
        "retrieval": retrieval(pairs, ks),
    }


def downstream(pairs: Pairs) -> dict[str, Scores]:
    """Scores of answers, KILT scores and scores of pages.

    Returns:
      `{"downstream": {"accuracy", "em", "f1", "rougel"}, "kilt": {"KILT-accuracy", …}, "retrieval":
      {"Rprec", "recall@5"}}`, means over questions, from 0 to 1. The KILT score of a question is its
      downstream score if its R-precision is 1, else 0.

    Raises:
      ValueError: a guess without `answer`, or a gold line without answers for a guess that has one.
    """
    plain, kilt = [], []
    for gold, guess in pairs:
        STOP.poll()  # Rouge-L of a long answer takes long.
        scores = answer_scores(gold, guess)
        right_pages = r_precision(guess.pages, gold.pages) == 1
        plain.append(scores)
        kilt.append({f"KILT-{key}": x if right_pages else 0.0 for key, x in scores.items()})
    pages = retrieval(pairs, [1, 5])
    return {
        "downstream": _means(plain),
        "kilt": _means(kilt),
        "retrieval": {name: pages[name] for name in ("Rprec", "recall@5")},
    }


def retrieval(pairs: Pairs, ks: Sequence[int] = KS) -> Scores:
    """Means over questions of `{"Rprec", "precision@k", "recall@k", "success_rate@k"}`.

    For k = 1 there is only precision, as in the official script.
    """
    return _means([retrieval_scores(gold, guess, ks) for gold, guess in pairs])


def answer_scores(gold: Gold, guess: Guess) -> Scores:
    """`{"accuracy", "em", "f1", "rougel"}` of one question, each the maximum over gold answers.

    An empty guess always scores 0.

    Raises:
      ValueError: the guess has no `answer`, or the gold line has no answers.
    """
    if guess.answer is None:
        raise ValueError(
            f"{guess.where}: expected an `answer` in `output`, as in other lines, got none. Write "
            '"answer": "" for an empty answer, or omit `answer` in all lines.'
        )
    if not guess.answer:
        return dict.fromkeys(ANSWER_METRICS, 0.0)
    if not gold.answers:
        raise ValueError(
            f"{gold.where}: expected an answer, because the guess has one, got none. Use a labelled "
            "gold file, or omit the answers of the guess file to score only its pages."
        )
    answer = guess.answer
    normal = normalize_answer(answer)
    return {
        "accuracy": float(answer in gold.answers),
        "em": float(any(normalize_answer(target) == normal for target in gold.answers)),
        "f1": max(word_f1(normal, normalize_answer(target)) for target in gold.answers),
        "rougel": max(rouge_l(answer, target) for target in gold.answers),
    }


def word_f1(prediction: str, target: str) -> float:
    """F1 over the words of two normalised answers, from 0 to 1; 0 if they share no word."""
    predicted, gold = prediction.split(), target.split()
    common = (Counter(predicted) & Counter(gold)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    # The order of operations of the official script, for bit-equality.
    return 2 * precision * recall / (precision + recall)


def task_metrics(*names: str) -> Callable[..., Scores]:
    """A seqio metric function: means of `accuracy`, `exact_match`, `f1` or `rougel`, from 0 to 1.

    Targets are lists of gold answers. A question without gold answers scores 0.
    """

    def metrics(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
        totals = dict.fromkeys(names, 0.0)
        for target, prediction in zip(targets, predictions, strict=True):
            answers = frozenset(answer.strip() for answer in target) - {""}
            if not answers:
                continue
            guess = Guess("prediction", prediction.strip(), ())
            scores = answer_scores(Gold("target", answers, (), ()), guess)
            for name in names:
                totals[name] += scores[_TASK_METRICS[name]]
        return {name: total / max(len(targets), 1) for name, total in totals.items()}

    return metrics


def retrieval_scores(gold: Gold, guess: Guess, ks: Sequence[int] = KS) -> Scores:
    """The scores of `retrieval` for one question."""
    scores = {"Rprec": r_precision(guess.pages, gold.pages)}
    marks = ranking(guess.pages, gold.evidence)
    for k in sorted(ks):
        hits = sum(marks[:k])
        scores[f"precision@{k}"] = hits / k
        if k > 1:
            # Without evidence, `hits` is 0.
            scores[f"recall@{k}"] = hits / max(1, len(gold.evidence))
            scores[f"success_rate@{k}"] = float(hits > 0)
    return scores


def r_precision(pages: Sequence[str], gold_pages: Iterable[Sequence[str]]) -> float:
    """Share of gold pages among the first R guesses, where R is the number of gold pages.

    Args:
      pages: distinct guessed pages, best first.
      gold_pages: distinct pages of each gold output; the maximum over outputs is returned.
    """
    shares = [
        sum(page in gold for page in pages[: len(gold)]) / len(gold) for gold in gold_pages if gold
    ]
    return max(shares, default=0.0)


def ranking(pages: Sequence[str], evidence: Sequence[frozenset[str]]) -> list[bool]:
    """Relevance marks of the official script: one per set of gold pages, one per page in no set.

    A set takes the rank of its last guessed page, and is True if all its pages were guessed. Its
    other pages do not count as ranks. So recall@5 may include pages beyond the fifth, and a page in
    two sets gives two marks.

        ranking(["a", "x", "b"], [frozenset("ab")]) -> [False, True]

    Args:
      pages: distinct guessed pages, best first.
      evidence: distinct sets of gold pages, in order.
    """
    rank_of = {page: rank for rank, page in enumerate(pages)}
    in_a_set = frozenset().union(*evidence)
    entries = [(rank, 0, False) for page, rank in rank_of.items() if page not in in_a_set]
    for number, gold in enumerate(evidence):
        ranks = [rank_of[page] for page in gold if page in rank_of]
        if ranks:
            entries.append((max(ranks), number, len(ranks) == len(gold)))
    return [is_complete for _, _, is_complete in sorted(entries)]


def _means(rows: Sequence[Mapping[str, float]]) -> Scores:
    totals = dict.fromkeys(rows[0], 0.0)
    for row in rows:
        # Not `sum`, which rounds differently from Python 3.12 on than the official scripts.
        for name, score in row.items():
            totals[name] += score
    return {name: total / len(rows) for name, total in totals.items()}


# Avoids division by zero in the harmonic mean; makes it slightly less than 1 for two ones.
_EPSILON = 1e-8


def rouge_l(prediction: str, target: str) -> float:
    """Rouge-L F-score of two texts, from 0 to 1; 0.0 if one of them has only full stops."""
    predicted, gold = _sentences(prediction), _sentences(target)
    if not predicted or not gold:
        return 0.0
    common: set[str] = set()
    for reference, sentence in product(gold, predicted):
        common |= common_words(reference, sentence)
    precision = len(common) / len(set().union(*predicted))
    recall = len(common) / len(set().union(*gold))
    return 2.0 * (precision * recall / (precision + recall + _EPSILON))


def common_words(reference: Sequence[str], sentence: Sequence[str]) -> set[str]:
    """Words of the longest common subsequence of two sentences.

    Among subsequences of equal length, the one that ends earliest in `sentence` is chosen. The
    choice affects the score, which uses the union of the words of all pairs of sentences.
    """
    # best[j]: (length, linked list of words) of the longest common subsequence of the reference
    # words so far and the first j words of the sentence.
    best: list[tuple[int, tuple]] = [(0, ())] * (len(sentence) + 1)
    for reference_word in reference:
        above, best = best, [(0, ())]
        for j, word in enumerate(sentence):
            if word == reference_word:
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
    # A sentence of spaces has one empty word.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]
