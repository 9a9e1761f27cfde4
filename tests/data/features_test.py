"""Passages looked up inside tf.data, for pipelines that are not ours."""

import numpy as np
import pytest

from glimmer_jax.axes import Lengths

tf = pytest.importorskip("tensorflow")
from glimmer_jax.data.features import TokensConverter

LENGTHS = Lengths(question=4, target=3, passages=2, passage=5)


class Corpus:
    """Passage 81 is in row 0, and its tokens are 5, 6, 1."""

    def rows(self, ids):
        assert set(np.unique(ids)) <= {81, -1}
        return np.where(ids == 81, 0, -1)

    def tokens(self, rows, length):
        assert length == 5
        return np.where(rows[:, None] == 0, [5, 6, 1, 0, 0], 0).astype(np.int32)


def examples(count=1):
    made = [{"inputs": [7, 8 + i], "targets": [9, 1], "passage_ids": [81]} for i in range(count)]
    columns = {name: np.array([one[name] for one in made]) for name in made[0]}
    dtypes = {"inputs": np.int32, "targets": np.int32, "passage_ids": np.int64}
    return tf.data.Dataset.from_tensor_slices({k: columns[k].astype(dtypes[k]) for k in columns})


def test_ids_have_become_tokens_at_the_converters_own_lengths():
    # seqio's Evaluator hands down other lengths, and none for P.
    handed_down = {"inputs": 2, "targets": 2, "passage_ids": 1}
    ds = TokensConverter(LENGTHS, Corpus())(examples(), handed_down)
    assert ds.element_spec["passage_tokens"].shape == (2, 5)
    got = next(ds.as_numpy_iterator())
    assert {name: x.tolist() for name, x in got.items()} == {
        "question_tokens": [0, 0, 7, 8],
        "passage_tokens": [[5, 6, 1, 0, 0], [0, 0, 0, 0, 0]],
        "decoder_input_tokens": [0, 9, 1],
        "decoder_target_tokens": [9, 1, 0],
        "decoder_loss_weights": [1.0, 1.0, 0.0],
    }


def test_inline_passages_need_no_corpus():
    tokens = {"inputs": [7], "targets": [1], "passages": [[4, 1]]}
    ds = tf.data.Dataset.from_tensors({k: tf.constant(v) for k, v in tokens.items()})
    got = next(TokensConverter(LENGTHS, None)(ds, {}).as_numpy_iterator())
    assert got["passage_tokens"].tolist() == [[4, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_a_saved_iterator_resumes_at_its_position(tmp_path):
    # T5X saves its data with a checkpoint, and TensorFlow cannot save an iterator with state in
    # Python.
    ds = TokensConverter(LENGTHS, Corpus())(examples(6), {}).shuffle(3, seed=0)
    iterator = iter(ds)
    next(iterator)
    saved = tf.train.Checkpoint(ds=iterator).write(str(tmp_path / "ds"))
    rest = [one["question_tokens"].numpy().tolist() for one in iterator]
    again = iter(ds)
    tf.train.Checkpoint(ds=again).read(saved).assert_consumed()
    assert [one["question_tokens"].numpy().tolist() for one in again] == rest
    assert len(rest) == 5


def test_ids_without_a_corpus_are_rejected():
    with pytest.raises(ValueError, match="PASSAGES_DIR is not set"):
        TokensConverter(LENGTHS, None)(examples(), {})
