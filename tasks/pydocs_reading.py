"""Reading exercises on the training modules of the built-in corpus.

pydocs_reading_1   two short passages, a clause cut word for word: copying and matching appear
pydocs_reading_2   five of full length, words dropped, look-alikes, a fifth of the titles real
pydocs_renamed     the three tasks of `tasks.pydocs` over retrieved files, all titles made up anew

They hold their passages themselves (no PASSAGES_DIR); K follows from TASK_FEATURE_LENGTHS, up to
`RENAMED_PASSAGES`.
"""

import functools

import seqio
import tensorflow as tf

from glimmer_jax.data import pydocs
from glimmer_jax.data.pydocs_tasks import TASKS
from glimmer_jax.data.reading import Exercises, Stage, blocks
from glimmer_jax.data.renaming import RenamedQuestions
from glimmer_jax.data.retrieved import retrieved_file
from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.kilt import read_examples

STAGES = {
    1: Stage(passages=2, passage_words=(10, 20), clause_words=(5, 9), spans=0.4),
    2: Stage(
        passages=5,
        passage_words=(15, 35),
        clause_words=(8, 16),
        dropped=0.35,
        spans=0.15,
        made_up_titles=0.8,
        siblings=0.4,
    ),
}
# Examples of an epoch. Made as they are read, from their index alone.
EPOCH = {"train": (0, 1_000_000), "validation": (1_000_000, 1_000_512)}


RENAMED_PASSAGES = 10
# Which function is asked more often: it alone is answered by reading a whole title.
SHARES = {"which_function": 4.0}


@functools.cache
def _exercises(number: int):
    return Exercises(pydocs.train_texts(), STAGES[number], Vocabulary(), seed=number)


@functools.cache
def _renamed():
    tasks = {name: list(read_examples(retrieved_file(name, "train"))) for name in TASKS}
    records = {record["id"]: record for record in pydocs.train_texts()}
    return RenamedQuestions(tasks, records, RENAMED_PASSAGES, Vocabulary(), SHARES)


def _dataset(split: str, shuffle_files: bool, seed: int | None = None, *, make):
    del shuffle_files, seed  # An example depends on its index alone.
    exercises = make()
    # Blocks, because every call from tensorflow into Python costs more than an exercise.
    ds = tf.data.Dataset.from_generator(
        lambda: blocks(exercises, *EPOCH[split]),
        output_signature={
            "inputs": tf.TensorSpec([None, None], tf.int32),
            "targets": tf.TensorSpec([None, None], tf.int32),
            "passages": tf.TensorSpec([None, None, None], tf.int32),
            "gold_passages": tf.TensorSpec([None, None], tf.int32),
        },
    )
    return ds.unbatch().map(_strip)


def _strip(example):
    return {
        name: tf.boolean_mask(tokens, tokens > 0) if name in ("inputs", "targets") else tokens
        for name, tokens in example.items()
    }


def _register(name: str, make):
    text = Vocabulary().seqio()
    whole = seqio.PassThroughVocabulary(size=2)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, make=make), splits=tuple(EPOCH)
        ),
        preprocessors=[],
        output_features={
            "inputs": seqio.Feature(text, add_eos=False),
            "targets": seqio.Feature(text),
            "passages": seqio.Feature(text, add_eos=False, rank=2),
            "gold_passages": seqio.Feature(whole, add_eos=False),
        },
        metric_fns=[],
        shuffle_buffer_size=1,
    )


for _number in STAGES:
    _register(f"pydocs_reading_{_number}", functools.partial(_exercises, _number))
_register("pydocs_renamed", _renamed)
