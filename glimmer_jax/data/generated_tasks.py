"""Tasks whose examples are computed, passages and all, from a stream's name and their index.

The seed of the run (`SEED`) chooses the stream of training examples: two seeds give different
examples, one seed always the same ones. Validation examples have a stream of their own, the same for
every seed.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import seqio
import tensorflow as tf

from glimmer_jax.vocabulary import Vocabulary

# Examples of an epoch.
EPOCH = {"train": 1_000_000, "validation": 512}


class Examples(Protocol):
    """Computes examples; each is a function of stream and index alone."""

    def example(self, index: int, stream: str = "") -> dict[str, Any]:
        """`inputs`, `targets` (token lists), `passages` (K token lists), `gold_passages` (K)."""
        ...


def register(
    name: str, make: Callable[[], Examples], vocabulary: Vocabulary = Vocabulary()
) -> None:
    """Registers the seqio task `name`; `make` is called when its examples are first read."""
    text = vocabulary.seqio()
    whole = seqio.PassThroughVocabulary(size=2)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, make=functools.cache(make)), splits=tuple(EPOCH)
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


def stream_name(split: str, seed: int | None) -> str:
    """Name of the stream that a split reads; only the training stream depends on the seed.

    Without a seed it is that of seed 0.
    """
    return f"{split}:{seed or 0}" if split == "train" else split


def blocks(
    examples: Examples, start: int, stop: int, size: int = 256, stream: str = ""
) -> Iterator[dict[str, np.ndarray]]:
    """Examples `start` to `stop` of a stream, `size` at a time, as int32 arrays padded with 0.

    Yields:
      `inputs` [n, Q], `targets` [n, T], `passages` [n, K, P], `gold_passages` [n, K].
    """
    for first in range(start, stop, size):
        made = [examples.example(i, stream) for i in range(first, min(first + size, stop))]
        passages = [ids for example in made for ids in example["passages"]]
        yield {
            "inputs": _padded([example["inputs"] for example in made]),
            "targets": _padded([example["targets"] for example in made]),
            "passages": np.reshape(_padded(passages), (len(made), len(passages) // len(made), -1)),
            "gold_passages": np.asarray([e["gold_passages"] for e in made], np.int32),
        }


def _padded(lists: list[list[int]]) -> np.ndarray:
    array = np.zeros((len(lists), max(map(len, lists))), np.int32)
    for row, ids in zip(array, lists, strict=True):
        row[: len(ids)] = ids
    return array


def _dataset(split: str, shuffle_files: bool, seed: int | None = None, *, make: Any) -> Any:
    del shuffle_files  # Every stream is in random order already.
    # Here, where an error is Python's own; inside the generator tensorflow would make it one of its.
    examples = make()
    # Blocks, because every call from tensorflow into Python costs more than an example.
    ds = tf.data.Dataset.from_generator(
        lambda: blocks(examples, 0, EPOCH[split], stream=stream_name(split, seed)),
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
