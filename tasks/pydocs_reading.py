"""Reading exercises on the training modules of the built-in corpus.

pydocs_reading_1   two short passages, a clause cut word for word: copying and matching appear
pydocs_reading_2   five of full length, words dropped, look-alikes, a fifth of the titles real
"""

import functools

import seqio
import tensorflow as tf

from glimmer_jax.data import pydocs
from glimmer_jax.data.reading import Exercises, Stage, blocks
from glimmer_jax.data.vocabulary import Vocabulary

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


@functools.cache
def _records():
    return pydocs.train_texts()


def _dataset(split: str, shuffle_files: bool, seed: int | None = None, *, number: int):
    del shuffle_files, seed  # Index and stage are all that an example depends on.
    exercises = Exercises(_records(), STAGES[number], Vocabulary(), seed=number)
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


for _number in STAGES:
    _text = Vocabulary().seqio()
    _whole = seqio.PassThroughVocabulary(size=2)
    seqio.TaskRegistry.add(
        f"pydocs_reading_{_number}",
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, number=_number), splits=tuple(EPOCH)
        ),
        preprocessors=[],
        output_features={
            "inputs": seqio.Feature(_text, add_eos=False),
            "targets": seqio.Feature(_text),
            "passages": seqio.Feature(_text, add_eos=False, rank=2),
            "gold_passages": seqio.Feature(_whole, add_eos=False),
        },
        metric_fns=[],
        shuffle_buffer_size=1,
    )
