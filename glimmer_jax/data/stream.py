"""Endless training examples of a task or mixture, from any example on, whose order has no state.

Example `i` of a run's stream is a function of `RANDOM_SEED`, `i`, the mixture's rates and the tasks'
data alone, so a resumed run needs nothing but its step.

* Mixtures: `order.Mixing` gives the task of example `i`, and how many examples of each task come
  before it. Rates are seqio's. A mixture's own `sample_fn` is not used.
* An example's number in its task's stream determines its epoch and its place in it. Every epoch has
  another order, which is a function of the seed and of the number of the epoch.
* Random preprocessors: tasks over retrieved files draw from `EXAMPLE_SEED`, a function of the run's
  seed and the example's number. Those of other tasks draw from seqio's seed, which depends on where
  a dataset starts. Their preprocessors therefore run on windows of `WINDOW` examples, with seeds
  that are a function of the run's seed and the number of the window.

What starting at an example costs, beyond starting at the first:

    generated tasks, retrieved files         nothing
    caches of retrieved files                reading the epoch up to the example, unprocessed
    other sources and caches                 the same, and fewer than WINDOW examples processed
    tasks that drop or multiply examples     processing the epoch up to the example; counting an
                                             epoch where TensorFlow does not know its size
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from glimmer_jax.data.features import GlimmerFeatureConverter
from glimmer_jax.data.order import Mixing, derived_seed

# Changes with the order of examples; a run that began with another one cannot be resumed.
DATA_ORDER = 2
# Examples that are preprocessed with one seed. TensorFlow's graph for them takes a fraction of a
# second to build.
WINDOW = 8192
# Examples that are converted to numpy together.
BLOCK = 64

# int64 [2], the feature that random preprocessors of tasks with an `IndexedSource` draw from.
EXAMPLE_SEED = "example_seed"

Batch = dict[str, Any]
# start -> the unprocessed examples of an endless stream, from number `start` on.
Start = Callable[[int], tf.data.Dataset]


class IndexedSource(seqio.FunctionDataSource):
    """A seqio source whose training stream can start at any example, at the same cost.

    Preprocessors of its tasks draw random numbers from the feature `EXAMPLE_SEED` where an example
    has it, not from seqio's seed.
    """

    def __init__(
        self,
        dataset_fn: Callable[..., tf.data.Dataset],
        splits: Sequence[str],
        stream_fn: Callable[[str, int], Start],
        num_input_examples: Mapping[str, int] | None = None,
    ):
        """Reads nothing yet.

        Args:
          dataset_fn: one epoch of a split, as in `seqio.FunctionDataSource`.
          splits: names of the splits.
          stream_fn: opens the endless, shuffled stream of a split and a seed.
          num_input_examples: of each split; None if unknown.
        """
        super().__init__(dataset_fn, splits, num_input_examples)
        self.stream_fn = stream_fn


def training_batches(
    mixture_or_task: Any,
    split: str,
    lengths: Mapping[str, Any],
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    use_cached: bool = False,
) -> Iterator[Batch]:
    """Yields the batches of `start_step`, `start_step + 1`, ... without end.

    Args:
      mixture_or_task: from seqio's registry.
      split: the tasks of the mixture that do not have it are left out.
      lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
      batch_size: examples per batch.
      seed: `RANDOM_SEED`.
      start_step: number of batches before the first.
      use_cached: read seqio's caches of the tasks that have one.

    Raises:
      ValueError: no task has the split and a rate above 0, or a data file is invalid.
    """
    features: set[str] | None = None
    rates = {mixture_or_task: 1.0}
    if isinstance(mixture_or_task, seqio.Mixture):
        features = set(mixture_or_task.output_features)
        rates = {task: mixture_or_task.get_rate(task) for task in mixture_or_task.tasks}
    rates = {task: rate for task, rate in rates.items() if rate > 0 and split in task.splits}
    if not rates:
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME: no task of {mixture_or_task.name} has {split} examples and a rate "
            "above 0. Choose another split or mixture."
        )
    mixing = Mixing(list(rates.values()), derived_seed(seed, 1))
    start = start_step * batch_size
    rows = []
    for task, count in zip(rates, mixing.counts(start), strict=True):
        stream = TaskStream(task, split, lengths, seed, use_cached, features)
        rows.append(_Rows(stream.blocks(int(count))))
    return _mixed(rows, mixing, start, batch_size)


def _mixed(rows: Sequence["_Rows"], mixing: Mixing, start: int, batch_size: int) -> Iterator[Batch]:
    for first in itertools.count(start, batch_size):
        tasks = mixing.tasks(first, batch_size)
        counts = np.bincount(tasks, minlength=len(rows))
        parts = [task.take(count) for task, count in zip(rows, counts, strict=True) if count]
        # Row `j` of the joined parts belongs in row `order[j]` of the batch.
        order = np.argsort(tasks, kind="stable")
        batch = {}
        for name in parts[0]:
            joined = np.concatenate([part[name] for part in parts])
            batch[name] = np.empty_like(joined)
            batch[name][order] = joined
        yield batch


class _Rows:
    """Takes any number of examples from a stream of blocks."""

    def __init__(self, blocks: Iterator[Batch]):
        self._blocks = blocks
        self._rest: Batch = {}
        self._num_rest = 0

    def take(self, count: int) -> Batch:
        parts = []
        while count:
            if not self._num_rest:
                self._rest = next(self._blocks)
                self._num_rest = _size(self._rest)
            taken = min(count, self._num_rest)
            parts.append({name: x[:taken] for name, x in self._rest.items()})
            self._rest = {name: x[taken:] for name, x in self._rest.items()}
            self._num_rest -= taken
            count -= taken
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


class TaskStream:
    """The endless training examples of one task."""

    def __init__(
        self,
        task: Any,
        split: str,
        lengths: Mapping[str, Any],
        seed: int,
        use_cached: bool = False,
        features: set[str] | None = None,
    ):
        """Reads nothing yet.

        Args:
          task: from seqio's registry.
          split: of the task.
          lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`.
          seed: `RANDOM_SEED`.
          use_cached: read seqio's cache, if the task supports caching.
          features: the features to keep before conversion; None for all.
        """
        self._task, self._split, self._lengths, self._seed = task, split, lengths, seed
        self._cached = use_cached and task.supports_caching
        self._seeded = isinstance(task.source, IndexedSource)
        self._features = features
        self._converter = GlimmerFeatureConverter()
        self._num_read = 0

    def blocks(self, start: int) -> Iterator[Batch]:
        """Yields examples `start`, `start + 1`, ... in blocks `{name: [n, ...]}`.

        Raises:
          ValueError: a data file is invalid, or the split has no examples.
        """
        datasets = self._datasets(start)
        # Opened now, so that an invalid file fails here.
        return self._read(itertools.chain([next(datasets)], datasets))

    def _read(self, datasets: Iterator[tf.data.Dataset]) -> Iterator[Batch]:
        for ds in datasets:
            for block in ds.batch(BLOCK).prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
                self._num_read += _size(block)
                yield block

    def _datasets(self, start: int) -> Iterator[tf.data.Dataset]:
        """Datasets that together hold the converted examples from `start` on."""
        if self._seeded and not self._cached:
            stream = self._task.source.stream_fn(self._split, self._seed)
            if self._keeps_count(stream(0)):
                return iter([self._preprocessed(self._with_seeds(stream(start), start))])
        else:
            epoch = self._unprocessed(0)
            if self._keeps_count(epoch):
                return self._sequential(*self._size(epoch, start), start)
        return self._epochs(start)

    def _sequential(self, size: int | None, passes: int, start: int) -> Iterator[tf.data.Dataset]:
        """Epochs of a source that is read from the beginning, in windows unless examples have seeds."""
        number, start = divmod(start, size * passes) if size else (0, start)
        while True:
            epoch = self._unprocessed(number)
            if passes > 1:
                epoch = epoch.cache()
            if self._task.shuffle_buffer_size is not None:
                seed = derived_seed(self._seed, 2, number)
                epoch = epoch.shuffle(self._task.shuffle_buffer_size, seed)
            epoch = epoch.repeat(passes)
            if self._seeded:
                yield self._preprocessed(self._with_seeds(epoch.skip(start), start, number))
            else:
                first = start // WINDOW
                # The next window is read while one is used.
                windows = epoch.skip(first * WINDOW).window(WINDOW).prefetch(1)
                for place, nested in enumerate(windows, first):
                    ds = self._preprocessed(tf.data.Dataset.zip(nested), number, place)
                    yield ds.skip(max(0, start - place * WINDOW))
            number, start = number + 1, 0

    def _epochs(self, start: int) -> Iterator[tf.data.Dataset]:
        """Epochs as seqio reads them.

        Random preprocessors may give every epoch another size. All are cut, or repeated, to the size
        of the first.
        """
        size, passes = self._size(self._epoch(0), start)
        if not size:
            yield self._epoch(0).skip(start)
            size = start + self._num_read
            start = size
        first, start = divmod(start, size * passes)
        for number in itertools.count(first):
            yield self._epoch(number, passes).repeat().take(size * passes).skip(start)
            start = 0

    def _size(self, epoch: tf.data.Dataset, start: int) -> tuple[int | None, int]:
        """The size of an epoch, and how many epochs to read together.

        Small epochs are read together, because opening a dataset takes a fraction of a second. The
        size is None for an unknown one that exceeds `start` and `WINDOW`.

        Raises:
          ValueError: the epoch is empty.
        """
        size = int(epoch.cardinality())
        if size < 0:
            # At most what is known to be enough: an epoch can be very long.
            bound = max(start, WINDOW) + 1
            size = int(epoch.take(bound).reduce(np.int64(0), lambda count, _: count + 1))
            if size == bound:
                return None, 1
        if not size:
            raise ValueError(
                f"MIXTURE_OR_TASK_NAME: {self._task.name} has no {self._split} examples. Leave it out "
                "of the mixture, or choose another split."
            )
        return size, -(-WINDOW // size)

    # Datasets of seqio.

    def _unprocessed(self, number: int) -> tf.data.Dataset:
        """An epoch of the task's source or cache, in an order of its own.

        seqio's shuffles give another order when a dataset is iterated again, so every dataset is
        iterated once.
        """
        source = self._task.source
        if self._cached:
            source = self._task._get_cached_source(self._split)  # It has no public name.
        ds = source.get_dataset(self._split, True, derived_seed(self._seed, 3, number))
        if self._cached:
            size = self._task.get_cached_stats(self._split)["examples"]
            ds = ds.apply(tf.data.experimental.assert_cardinality(size))
        return ds

    def _keeps_count(self, ds: tf.data.Dataset) -> bool:
        """Whether every example of a source becomes exactly one; nothing is read."""
        probe = ds.repeat().apply(tf.data.experimental.assert_cardinality(WINDOW))
        return int(self._preprocessed(self._with_seeds(probe, 0)).cardinality()) == WINDOW

    def _with_seeds(self, ds: tf.data.Dataset, start: int, *numbers: int) -> tf.data.Dataset:
        """Adds `EXAMPLE_SEED` to examples that begin with number `start` of what `numbers` name."""
        if not self._seeded:
            return ds
        seed = tf.constant(derived_seed(self._seed, 6, *numbers), tf.int64)
        return ds.enumerate(start).map(
            lambda number, example: {**example, EXAMPLE_SEED: tf.stack([seed, number])}
        )

    def _preprocessed(self, raw: tf.data.Dataset, *numbers: int) -> tf.data.Dataset:
        """Converted examples after the task's preprocessors, with seqio's seed of these numbers."""
        preprocessors = list(self._task.preprocessors)
        if self._cached:
            kinds = [type(preprocessor) for preprocessor in preprocessors]
            preprocessors = preprocessors[kinds.index(seqio.CacheDatasetPlaceholder) + 1 :]

        def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            del split, shuffle_files, seed
            return raw

        task = self._task.replace(
            source=seqio.FunctionDataSource(dataset, [self._split]), preprocessors=preprocessors
        )
        ds = task.get_dataset(
            self._lengths, self._split, shuffle=False, seed=derived_seed(self._seed, 4, *numbers)
        )
        return self._converted(ds)

    def _epoch(self, number: int, passes: int = 1) -> tf.data.Dataset:
        ds = self._task.get_dataset(
            self._lengths,
            self._split,
            use_cached=self._cached,
            shuffle=True,
            seed=derived_seed(self._seed, 5, number),
            num_epochs=passes,
        )
        return self._converted(ds)

    def _converted(self, ds: tf.data.Dataset) -> tf.data.Dataset:
        features = self._features
        if features is not None:
            ds = ds.map(lambda example: {name: example[name] for name in sorted(features)})
        return self._converter(ds, self._lengths)
