"""Generated tasks through seqio: the run's seed chooses the examples, a restart repeats none."""

import functools

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")

from glimmer_jax.data import generated_tasks, pipeline
from glimmer_jax.data.features import GlimmerFeatureConverter
from glimmer_jax.data.fit import check_fit
from glimmer_jax.pydocs.reading_exercises import Exercises, Stage
from glimmer_jax.vocabulary import Vocabulary

LENGTHS = {"inputs": 40, "targets": 40, "passages": (2, 48)}
RECORDS = [
    {"title": f"mod.func_{i}", "module": "mod", "text": " ".join(f"w{i}x{j}" for j in range(9))}
    for i in range(10)
]
STAGE = Stage(passages=2, passage_words=(4, 5), clause_words=(2, 3))


@pytest.fixture(scope="module", autouse=True)
def tasks():
    """Two generated tasks and their mixture."""
    for number in (1, 2):
        make = functools.partial(Exercises, RECORDS, STAGE, Vocabulary("pydocs"), seed=number)
        generated_tasks.register(f"generated_{number}", make)
    seqio.MixtureRegistry.add("generated", ["generated_1", "generated_2"], default_rate=1.0)
    yield
    seqio.MixtureRegistry.remove("generated")
    for number in (1, 2):
        seqio.TaskRegistry.remove(f"generated_{number}")


def take(count, name="generated_1", split="train", **settings):
    stream = pipeline.batches(name, split, LENGTHS, 4, **settings)
    return [next(stream) for _ in range(count)]


def validation(seed):
    ds = seqio.get_dataset(
        "generated_1", LENGTHS, GlimmerFeatureConverter(), "validation", shuffle=False, seed=seed
    )
    return list(ds.batch(4).take(8).as_numpy_iterator())


def rows(batches):
    """Each example as bytes."""
    names = sorted(batches[0])
    return [b"".join(one[n][i].tobytes() for n in names) for one in batches for i in range(4)]


@pytest.mark.parametrize("name", ["generated_1", "generated"])
def test_one_seed_gives_the_same_batches_and_another_seed_others(name):
    first = rows(take(8, name, seed=3))
    assert first == rows(take(8, name, seed=3))
    assert len(set(first)) == len(first)
    for other in (0, 4):
        assert not set(first) & set(rows(take(8, name, seed=other)))


def test_validation_differs_from_training_and_ignores_the_seed():
    fixed = rows(validation(seed=0))
    assert fixed == rows(validation(seed=5))
    assert not set(fixed) & set(rows(take(8, seed=0)) + rows(take(8, seed=5)))


def test_a_resumed_run_reads_what_comes_next_bit_for_bit():
    assert rows(take(9, seed=7))[20:] == rows(take(4, seed=7, start_step=5))


def test_processes_share_one_stream():
    both = take(3, seed=7)
    for own in ([0, 1], [2, 3]):
        for batch, part in zip(both, take(3, seed=7, own_rows=np.array(own)), strict=True):
            for name in batch:
                np.testing.assert_array_equal(batch[name][own], part[name])


def test_without_a_seed_it_is_seed_0():
    task = seqio.get_mixture_or_task("generated_1")

    def read(**seed):
        ds = task.get_dataset(None, "train", shuffle=False, num_epochs=1, **seed).take(4)
        return [one["inputs"].tolist() for one in ds.as_numpy_iterator()]

    assert read() == read(seed=0) != read(seed=1)


def test_cut_passages_of_examples_that_hold_them_are_counted(caplog):
    def cuts(split, length):
        fit = {**LENGTHS, "passages": (2, length)}
        settings = dict(vocabulary=Vocabulary("pydocs"), has_passages=False, examples=20)
        return check_fit("generated_1", split, fit, **settings)["passages_cut"]

    assert cuts("train", 99) == cuts("validation", 99) == 0 and not caplog.records
    assert cuts("train", 12) == 20 and not caplog.records
    assert cuts("validation", 12) == 20
    assert "20 of 20 passages of generated_1 (validation)" in caplog.text
