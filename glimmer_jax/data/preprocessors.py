"""From lines of retrieved task files to seqio's text features.

    {"id": "which_function/json.dump/0", "input": "formatted stream to file-like",
     "output": [{"answer": "json.dump", "provenance": [{..., "bleu_score": 1.0}]}],
     "retrieved": [{"id": 81, "score": 11.3, "gold": true}, {"id": 7, "score": 9.0, "gold": false}]}

becomes

    {"id": "which_function/json.dump/0", "question": "formatted stream to file-like",
     "answers": ["json.dump"], "passage_ids": [81, 7], "gold_passages": [1, 0]}

and, with one of the answers drawn anew in every epoch,

    {..., "inputs": "question: formatted stream to file-like", "targets": "json.dump"}
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from glimmer_jax.corpus.ids import id_number
from glimmer_jax.kilt.examples import answers
from glimmer_jax.vocabulary import question_text

# Training pairs whose provenance matches the knowledge source less than this are left out.
MIN_BLEU = 0.5


def answered_by_source(output: Mapping[str, Any], min_bleu: float) -> bool:
    """Whether the knowledge source holds this output's answer.

    KILT mapped older data sets onto its own Wikipedia and wrote down in `bleu_score` how well each
    provenance was found again. An output without such scores is trusted.
    """
    scores = [one.get("bleu_score") for one in output.get("provenance", [])]
    # The Hugging Face hub writes -1.0 where KILT leaves the score out.
    known = [score for score in scores if score is not None and score >= 0]
    return not known or max(known) >= min_bleu


def example_features(line: Mapping[str, Any], min_bleu: float = 0.0) -> dict[str, Any] | None:
    """Features of one line of a retrieved file; see the module's docstring.

    Returns:
      None for a line none of whose answers reaches `min_bleu`.

    Raises:
      ValueError: the line has not been through retrieval.
    """
    if "retrieved" not in line:
        raise ValueError(
            f"Example {line['id']!r} has no passages. Run --run_mode=retrieve on the task file and "
            "read its output."
        )
    found = answers(line)
    if min_bleu > 0:
        sound = [one for one in line["output"] if answered_by_source(one, min_bleu)]
        found = answers({"output": sound})
        if not found:
            return None
    return {
        "id": line["id"],
        "question": line["input"],
        "answers": found,
        "passage_ids": [id_number(one["id"]) for one in line["retrieved"]],
        "gold_passages": [int(bool(one.get("gold"))) for one in line["retrieved"]],
    }


class Columns:
    """Features of examples in arrays, not objects: T-REx alone has 91 million passage ids."""

    def __init__(self, examples: Iterable[Mapping[str, Any]]):
        """Takes feature dictionaries of `example_features`, one after the other."""
        self._ids: list[bytes] = []
        self._questions: list[bytes] = []
        self._answers: list[bytes] = []
        self._answer_counts = array("q")
        self._passage_ids = array("q")
        self._gold = array("b")
        self._passage_counts = array("q")
        for one in examples:
            self._ids.append(one["id"].encode("utf-8"))
            self._questions.append(one["question"].encode("utf-8"))
            self._answers += [answer.encode("utf-8") for answer in one["answers"]]
            self._answer_counts.append(len(one["answers"]))
            self._passage_ids.extend(one["passage_ids"])
            self._gold.extend(one["gold_passages"])
            self._passage_counts.append(len(one["passage_ids"]))

    def __len__(self) -> int:
        return len(self._ids)

    def dataset(self, order: Sequence[int] | None = None) -> tf.data.Dataset:
        """A dataset of the examples, held in memory, in their order or in that of their numbers."""

        def ragged(values: tf.Tensor, counts: array) -> tf.RaggedTensor:
            return tf.RaggedTensor.from_row_lengths(values, np.asarray(counts, np.int64))

        passage_ids = np.asarray(self._passage_ids, np.int64)
        gold = np.asarray(self._gold, np.int32)
        columns = {
            "id": tf.constant(self._ids, tf.string),
            "question": tf.constant(self._questions, tf.string),
            "answers": ragged(tf.constant(self._answers, tf.string), self._answer_counts),
            "passage_ids": ragged(tf.constant(passage_ids), self._passage_counts),
            "gold_passages": ragged(tf.constant(gold), self._passage_counts),
        }
        if order is not None:
            columns = {name: tf.gather(column, order) for name, column in columns.items()}
        return tf.data.Dataset.from_tensor_slices(columns)


@seqio.map_over_dataset(num_seeds=1)
def draw_answer(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """`inputs` and `targets`: the question, and one of its answers (empty if it has none).

    The same seed of the dataset draws the same answers; every epoch draws anew.
    """
    known = example["answers"]
    index = tf.random.stateless_uniform(
        [], seed, maxval=tf.maximum(tf.size(known), 1), dtype=tf.int32
    )
    drawn = tf.cond(tf.size(known) > 0, lambda: known[index], lambda: tf.constant(""))
    return {**example, "inputs": question_text(example["question"]), "targets": drawn}


def all_answers(text: str, example: Any = None, is_target: bool = False) -> Any:
    """seqio's postprocessor: a target becomes the list of all answers, a prediction stays."""
    if not is_target:
        return text
    return [answer.decode("utf-8") for answer in example["answers"]]
