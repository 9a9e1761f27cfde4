"""Reading exercises on the training modules of the built-in corpus.

    pydocs_reading_1   two short passages and verbatim clauses: copying and matching emerge
    pydocs_reading_2   five passages of full length, many from the same module; dropped words;
                       a fifth of the examples with real titles

Examples hold their passages themselves (no PASSAGES_DIR).
"""

import functools

from glimmer_jax.data import generated_tasks
from glimmer_jax.pydocs import corpus
from glimmer_jax.pydocs.reading_exercises import Exercises, Stage
from glimmer_jax.vocabulary import Vocabulary

# What this module registers; read before seqio is imported.
NAMES = ("pydocs_reading_1", "pydocs_reading_2")
STAGES = {
    1: Stage(passages=2, passage_words=(10, 20), clause_words=(5, 9), spans=0.4),
    2: Stage(
        passages=5,
        passage_words=(15, 35),
        clause_words=(8, 16),
        dropped=0.35,
        spans=0.15,
        synthetic_titles=0.8,
        siblings=0.4,
    ),
}


def _exercises(number: int) -> Exercises:
    return Exercises(corpus.train_texts(), STAGES[number], Vocabulary("pydocs"), seed=number)


for _number in STAGES:
    generated_tasks.register(f"pydocs_reading_{_number}", functools.partial(_exercises, _number))
