"""KILT's official scores of a guess file against a gold file, to the last bit.

Metrics of the KILT benchmark (Petroni et al., arXiv 2009.02252, section 5), with the keys and values of
its scripts `eval_downstream.py` and `eval_retrieval.py`, so that numbers compare with the leaderboard's.
The retrieval script's scores of passage texts (`answer_in_context@k`), which no leaderboard has, are left
out. Differences from `glimmer_jax.metrics.qa`, each with a test: accuracy compares case and punctuation,
an answer of articles alone has no F1, and recall@k counts sets of pages.

Rouge-L (Lin, 2004, summary level) is that of version 1.0.1 of the `rouge` package, which KILT's scripts
call, ties included: sentences end at full stops, words are compared unchanged, and each distinct word
counts once. The package itself is not used, because it recurses once per word: ELI5's answers of about a
thousand words raise RecursionError.

`glimmer_jax.metrics.kilt_predictions` reads the files; everything here is a function of its result.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from glimmer_jax.metrics.kilt_predictions import Gold, Guess, read_pairs
from glimmer_jax.metrics.qa import normalize_answer

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

    `downstream` is None where no guess has an answer, as in runs of retrieval alone.

    Raises:
      ValueError: `ks` are not distinct positive numbers, or the files do not fit (`read_pairs`).
    """
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f"ks must be distinct numbers from 1, such as 1,5,20, got {list(ks)}.")
    pairs = read_pairs(gold_path, guess_path)
    answered = any(guess.answer is not None for _, guess in pairs)
    return {
        "downstream": downstream(pairs) if answered else None,
        "retrieval": retrieval(pairs, ks),
    }


def downstream(pairs: Pairs) -> dict[str, Scores]:
    """Answers, answers whose pages are right too, and pages.

    Returns:
      `{"downstream": {"accuracy", "em", "f1", "rougel"}, "kilt": {"KILT-accuracy", …}, "retrieval":
      {"Rprec", "recall@5"}}`, means over questions, from 0 to 1. A question's KILT score is its plain
      score where its R-precision is 1, else 0.

    Raises:
      ValueError: a guess without `answer`, or a gold line without answers for a guess that has one.
    """
    plain, kilt = [], []
    for gold, guess in pairs:
        scores = answer_scores(gold, guess)
        right_pages = r_precision(guess.pages, gold.pages) == 1
        plain.append(scores)
        kilt.append({f"KILT-{key}": one if right_pages else 0.0 for key, one in scores.items()})
    pages = retrieval(pairs, [1, 5])
    return {
        "downstream": _means(plain),
        "kilt": _means(kilt),
        "retrieval": {name: pages[name] for name in ("Rprec", "recall@5")},
    }


def retrieval(pairs: Pairs, ks: Sequence[int] = KS) -> Scores:
    """Means over questions of `{"Rprec", "precision@k", "recall@k", "success_rate@k"}`.

    At 1 there is precision only, as in the official script: there success rate equals it.
    """
    return _means([retrieval_scores(gold, guess, ks) for gold, guess in pairs])


def answer_scores(gold: Gold, guess: Guess) -> Scores:
    """`{"accuracy", "em", "f1", "rougel"}` of one question, each with its best gold answer.

    An empty guess scores 0 everywhere, whatever the gold answers.
    """
    if guess.answer is None:
        raise ValueError(
            f"{guess.where}: wanted an `answer` in `output`, got none, while other lines have one. "
            'Write "answer": "" where there is no answer, or leave out all of them.'
        )
    if not guess.answer:
        return dict.fromkeys(ANSWER_METRICS, 0.0)
    if not gold.answers:
        raise ValueError(
            f"{gold.where}: no answer to compare the guess with. Give a labelled gold file, or leave "
            "the answers out of the guess file to score its pages alone."
        )
    answer = guess.answer
    normal = normalize_answer(answer)
    return {
        "accuracy": float(answer in gold.answers),
        "em": float(any(normalize_answer(one) == normal for one in gold.answers)),
        "f1": max(word_f1(normal, normalize_answer(one)) for one in gold.answers),
        "rougel": max(rouge_l(answer, one) for one in gold.answers),
    }


def word_f1(prediction: str, target: str) -> float:
    """Overlap of the words of two normalised answers; two answers without words share none."""
    got, wanted = prediction.split(), target.split()
    common = (Counter(got) & Counter(wanted)).total()
    if not common:
        return 0.0
    precision, recall = common / len(got), common / len(wanted)
    # The harmonic mean in this order of operations, for the official last bit.
    return 2 * precision * recall / (precision + recall)


def task_metrics(*names: str) -> Callable[..., Scores]:
    """A metric function for seqio: means of `accuracy`, `exact_match`, `f1` or `rougel`.

    Targets are lists of gold answers; one without any scores 0, as a question without labels must not
    stop an evaluation of others.
    """

    def metrics(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
        totals = dict.fromkeys(names, 0.0)
        for target, prediction in zip(targets, predictions, strict=True):
            answers = frozenset(one.strip() for one in target) - {""}
            if not answers:
                continue
            guess = Guess("prediction", prediction.strip(), ())
            scores = answer_scores(Gold("target", answers, (), ()), guess)
            for name in names:
                totals[name] += scores[_TASK_METRICS[name]]
        return {name: total / max(len(targets), 1) for name, total in totals.items()}

    return metrics


def retrieval_scores(gold: Gold, guess: Guess, ks: Sequence[int] = KS) -> Scores:
    """`retrieval`'s scores of one question."""
    scores = {"Rprec": r_precision(guess.pages, gold.pages)}
    marks = ranking(guess.pages, gold.evidence)
    for k in sorted(ks):
        hits = sum(marks[:k])
        scores[f"precision@{k}"] = hits / k
        if k > 1:
            # Where there is nothing to be found, nothing is.
            scores[f"recall@{k}"] = hits / max(1, len(gold.evidence))
            scores[f"success_rate@{k}"] = float(hits > 0)
    return scores


def r_precision(pages: Sequence[str], gold_pages: Iterable[Sequence[str]]) -> float:
    """Share of right pages among the first R, where R is how many pages a gold output names.

    Args:
      pages: guessed, distinct, best first.
      gold_pages: distinct pages of each gold output; the best output counts.
    """
    shares = [
        sum(page in gold for page in pages[: len(gold)]) / len(gold) for gold in gold_pages if gold
    ]
    return max(shares, default=0.0)


def ranking(pages: Sequence[str], evidence: Sequence[frozenset[str]]) -> list[bool]:
    """Marks of what was found, best first: one a set of gold pages, one a page of no set.

    A set stands where the last guessed page of it stands, and is marked True if it was found whole;
    the places of its other pages close up. So recall@5 may reach beyond the fifth page, and one page
    that two sets share gives two marks.

        ranking(["a", "x", "b"], [frozenset("ab")]) -> [False, True]

    Args:
      pages: guessed, distinct, best first.
      evidence: distinct sets of gold pages, in order.
    """
    place_of = {page: place for place, page in enumerate(pages)}
    in_a_set = frozenset().union(*evidence)
    points = [(place, 0, False) for page, place in place_of.items() if page not in in_a_set]
    for number, gold in enumerate(evidence):
        found = [place_of[page] for page in gold if page in place_of]
        if found:
            points.append((max(found), number, len(found) == len(gold)))
    return [whole for _, _, whole in sorted(points)]


def _means(rows: Sequence[Mapping[str, float]]) -> Scores:
    totals = dict.fromkeys(rows[0], 0.0)
    for row in rows:
        # One by one: from Python 3.12 on, `sum` rounds better than the official scripts do.
        for name, score in row.items():
            totals[name] += score
    return {name: total / len(rows) for name, total in totals.items()}


# Defines the harmonic mean of two zeros; that of two ones is just below 1.
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
