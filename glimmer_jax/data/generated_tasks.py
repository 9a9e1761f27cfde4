"""Tasks whose examples, including passages, are computed from the name of a stream and an index.

The seed of the run (`RANDOM_SEED`) selects the stream of training examples. The same seed always
gives the same examples, and different seeds give different ones. Validation examples are the same
for every seed.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import seqio
import tensorflow as tf

from glimmer_jax.data.stream import IndexedSource, Start
from glimmer_jax.vocabulary import Vocabulary

# Examples per epoch where seqio reads them. A training stream of `data.stream` never repeats one.
EPOCH = {"train": 1_000_000, "validation": 512}
ENDLESS = 2**62


class Examples(Protocol):
    """Computes examples; each depends only on its stream and index."""

    def example(self, index: int, stream: str = "") -> dict[str, Any]:
        """`inputs`, `targets` (token lists), `passages` (K token lists), `gold_passages` (0 or 1)."""
        ...


def register(
    name: str, make: Callable[[], Examples], vocabulary: Vocabulary = Vocabulary("pydocs")
) -> None:
    """Registers a seqio task with generated examples.

    Args:
      name: of the task.
      make: creates the generator; called once, when examples are first read.
      vocabulary: of questions, answers and passages.

    Raises:
      ValueError: a task of this name is already registered.
    """
    text = vocabulary.seqio()
    marks = seqio.PassThroughVocabulary(size=2)
    seqio.TaskRegistry.add(
        name,
        source=_source(functools.cache(make)),
        preprocessors=[],
        output_features={
            "inputs": seqio.Feature(text, add_eos=False),
            "targets": seqio.Feature(text),
            "passages": seqio.Feature(text, add_eos=False, rank=2),
            "gold_passages": seqio.Feature(marks, add_eos=False),
        },
        metric_fns=[],
        shuffle_buffer_size=1,
    )


def stream_name(split: str, seed: int | None) -> str:
    """Name of the stream of a split. Only the training stream depends on the seed; None equals 0."""
    return f"{split}:{seed or 0}" if split == "train" else split


def blocks(
    examples: Examples, start: int, stop: int, size: int = 256, stream: str = ""
) -> Iterator[dict[str, np.ndarray]]:
    """Yields examples `start` to `stop` of a stream in blocks of `size`, padded with 0.

    Yields:
      int32 `inputs` [n, Q], `targets` [n, T], `passages` [n, K, P] and `gold_passages` [n, K]. Q, T
      and P are those of the longest example in the block.
    """
    for first in range(start, stop, size):
        block = [examples.example(i, stream) for i in range(first, min(first + size, stop))]
        passages = [ids for example in block for ids in example["passages"]]
        num_passages = len(passages) // len(block)
        yield {
            "inputs": _padded([example["inputs"] for example in block]),
            "targets": _padded([example["targets"] for example in block]),
            "passages": np.reshape(_padded(passages), (len(block), num_passages, -1)),
            "gold_passages": np.asarray([e["gold_passages"] for e in block], np.int32),
        }


def _padded(lists: list[list[int]]) -> np.ndarray:
    array = np.zeros((len(lists), max(map(len, lists))), np.int32)
    for row, ids in zip(array, lists, strict=True):
        row[: len(ids)] = ids
    return array


def _source(make: Callable[[], Examples]) -> IndexedSource:
    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files  # Streams are already in random order.
        return _dataset(make(), stream_name(split, seed), 0, EPOCH[split])

    def stream_fn(split: str, seed: int) -> Start:
        # Created here, because TensorFlow would wrap an exception raised inside the generator.
        examples, name = make(), stream_name(split, seed)
        return lambda start: _dataset(examples, name, start, ENDLESS)

    return IndexedSource(dataset_fn, tuple(EPOCH), stream_fn, EPOCH)


def _dataset(examples: Examples, stream: str, start: int, stop: int) -> tf.data.Dataset:
    # Blocks, because a call from TensorFlow into Python costs more than computing an example.
    ds = tf.data.Dataset.from_generator(
        lambda: blocks(examples, start, stop, stream=stream),
        output_signature={
            "inputs": tf.TensorSpec([None, None], tf.int32),
            "targets": tf.TensorSpec([None, None], tf.int32),
            "passages": tf.TensorSpec([None, None, None], tf.int32),
            "gold_passages": tf.TensorSpec([None, None], tf.int32),
        },
    )
    return ds.unbatch().map(_strip)


def _strip(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {
        name: tf.boolean_mask(tokens, tokens > 0) if name in ("inputs", "targets") else tokens
        for name, tokens in example.items()
    }
