"""Training streams start anywhere, at the same cost, with the examples of an uninterrupted run."""

import functools
import json

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")
import tensorflow as tf

from glimmer_jax.data import cache, generated_tasks, pipeline, retrieved_tasks, stream
from glimmer_jax.pydocs.reading_exercises import Exercises, Stage
from glimmer_jax.vocabulary import Vocabulary

LENGTHS = {"inputs": 12, "targets": 12, "passages": (2, 48)}
BATCH = 4
NUM_LINES = 13  # of `retrieved` and `cached`
NUM_NUMBERS = 11  # of `numbers` and `filtered`
KINDS = ("retrieved", "cached", "numbers", "filtered", "generated", "mixture")
COUNTED = []  # One entry for each example that a source or preprocessor produces.


def counted(ds):
    """Counts the examples that reach this place of a pipeline."""

    def count(example):
        one = tf.numpy_function(lambda: COUNTED.append(1) or np.int64(1), [], tf.int64)
        with tf.control_dependencies([one]):
            return {name: tf.identity(x) for name, x in example.items()}

    return ds.map(count)


@seqio.map_over_dataset(num_seeds=1)
def with_random_token(example, seed):
    """Turns a number into features, one of whose tokens seqio's seed draws."""
    token = tf.random.stateless_uniform([], seed, 5, 1000, tf.int32)
    return {
        "inputs": tf.stack([tf.cast(example["number"], tf.int32) + 5, token]),
        "targets": tf.constant([7, 1]),
        "passage_ids": example["number"][None],
        "gold_passages": tf.constant([1]),
    }


def without_large_tokens(ds):
    """Drops random examples, other ones in every epoch."""
    return ds.filter(lambda example: example["inputs"][1] < 700)


def numbers(split, shuffle_files, seed=None):
    """A dataset whose size TensorFlow does not know."""
    del split, shuffle_files, seed
    signature = {"number": tf.TensorSpec([], tf.int64)}

    def rows():
        return ({"number": n} for n in range(NUM_NUMBERS))

    return counted(tf.data.Dataset.from_generator(rows, output_signature=signature))


class CountedExercises(Exercises):
    def example(self, index, stream=""):
        COUNTED.append(1)
        return super().example(index, stream)


def add(name, task):
    seqio.TaskRegistry.add_provider(name, task.replace(name=name))


@pytest.fixture(scope="module", autouse=True)
def tasks(tmp_path_factory):
    """Registers one task of each kind, and a mixture."""
    folder = tmp_path_factory.mktemp("stream")
    rows = [
        {
            "id": f"q{n}",
            "input": f"words {n}",
            "output": [{"answer": a} for a in "abcdefgh"],
            "retrieved": [{"id": n, "gold": True}, {"id": n + 1, "gold": False}],
        }
        for n in range(NUM_LINES)
    ]
    (folder / "lines-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    retrieved_tasks.configure(folder)
    task = retrieved_tasks.register("lines", "lines", [], {"train": NUM_LINES})
    task = task.replace(preprocessors=[*task.preprocessors, counted])
    add("retrieved", task)
    add("cached", task)
    cache.write("cached", str(folder / "cache"), num_shards=3)
    source = seqio.FunctionDataSource(numbers, ["train"])
    task = task.replace(source=source, preprocessors=[with_random_token])
    add("numbers", task)
    add("filtered", task.replace(preprocessors=[with_random_token, without_large_tokens]))
    rates = [("retrieved", 1), ("numbers", 2.5), ("filtered", 0.5), ("lines", 0)]
    seqio.MixtureRegistry.add("mixture", rates)
    records = [
        {"title": f"mod.func_{i}", "module": "mod", "text": " ".join(f"w{i}x{j}" for j in range(9))}
        for i in range(10)
    ]
    stage = Stage(passages=2, passage_words=(4, 5), clause_words=(2, 3))
    make = functools.partial(CountedExercises, records, stage, Vocabulary("pydocs"), seed=1)
    generated_tasks.register("generated", make)
    cache_dirs = seqio.get_global_cache_dirs()
    seqio.set_global_cache_dirs([str(folder / "cache")])
    yield
    seqio.set_global_cache_dirs(cache_dirs)
    retrieved_tasks.configure()
    seqio.MixtureRegistry.remove("mixture")
    for name in ("lines", *KINDS[:-1]):
        seqio.TaskRegistry.remove(name)


@pytest.fixture
def window(monkeypatch):
    """Windows shorter than an epoch."""
    monkeypatch.setattr(stream, "WINDOW", 8)


def batches(kind, count, start_step=0, **settings):
    settings = {"seed": 3, "use_cached": kind == "cached", **settings}
    ds = pipeline.batches(kind, "train", LENGTHS, BATCH, start_step=start_step, **settings)
    return [next(ds) for _ in range(count)]


def rows(batches):
    """Each example as bytes."""
    names = sorted(batches[0])
    return [
        b"".join(batch[name][i].tobytes() for name in names)
        for batch in batches
        for i in range(len(batch[names[0]]))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_is_the_uninterrupted_one_and_seeds_differ(kind, window):
    """Step 2 is in the first epoch, step 8 in a later one."""
    whole = rows(batches(kind, 10))
    for start in (2, 8):
        assert rows(batches(kind, 2, start)) == whole[BATCH * start : BATCH * (start + 2)], start
    assert rows(batches(kind, 2, seed=4)) != whole[: BATCH * 2]


def test_processes_keep_their_rows_of_a_resumed_stream():
    both = batches("mixture", 2, start_step=7)
    for own in ([0, 1], [2, 3]):
        parts = batches("mixture", 2, start_step=7, own_rows=np.array(own))
        for batch, part in zip(both, parts, strict=True):
            for name in batch:
                np.testing.assert_array_equal(batch[name][own], part[name])


@pytest.mark.parametrize("kind", KINDS)
def test_starting_at_step_100_000_produces_few_examples(kind, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 256)
    COUNTED.clear()
    batches(kind, 1, start_step=100_000)
    tasks = 3 if kind == "mixture" else 1
    assert 0 < len(COUNTED) < 4 * 256 * tasks


@pytest.mark.parametrize("kind", ["retrieved", "cached", "numbers"])
def test_every_epoch_holds_every_example_once_with_new_draws(kind, window):
    size = NUM_NUMBERS if kind == "numbers" else NUM_LINES
    read = batches(kind, size)  # `BATCH` epochs.
    ids = np.concatenate([batch["passage_ids"][:, 0] for batch in read]).reshape(BATCH, size)
    assert (np.sort(ids, axis=1) == np.arange(size)).all()
    assert len(set(rows(read))) > 2 * size


def test_a_mixture_has_the_rates_of_its_registration():
    read = batches("mixture", 256)
    first = np.concatenate([batch["decoder_target_tokens"][:, 0] for batch in read])
    assert np.mean(first == 7) == pytest.approx(0.75, abs=0.01)


def test_a_split_that_no_task_has_is_rejected():
    with pytest.raises(ValueError, match="MIXTURE_OR_TASK_NAME.*mixture.*test"):
        pipeline.batches("mixture", "test", LENGTHS, BATCH)


def test_an_empty_task_is_rejected(monkeypatch):
    monkeypatch.setattr(f"{__name__}.NUM_NUMBERS", 0)
    with pytest.raises(ValueError, match="numbers has no train examples"):
        pipeline.batches("numbers", "train", LENGTHS, BATCH)
