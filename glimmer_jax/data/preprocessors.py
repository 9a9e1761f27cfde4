"""Converts lines of retrieved task files to seqio's text features.

    {"id": "which_function/json.dump/0", "input": "formatted stream to file-like",
     "output": [{"answer": "json.dump", "provenance": [{..., "bleu_score": 1.0}]}],
     "retrieved": [{"id": 81, "score": 11.3, "gold": true}, {"id": 7, "score": 9.0, "gold": false}]}

becomes

    {"id": "which_function/json.dump/0", "question": "formatted stream to file-like",
     "answers": ["json.dump"], "passage_ids": [81, 7], "gold_passages": [1, 0]}

`draw_answer` then draws one of the answers, a new one in every epoch:

    {..., "inputs": "question: formatted stream to file-like", "targets": "json.dump"}
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from glimmer_jax.corpus.ids import id_number
from glimmer_jax.data.stream import EXAMPLE_SEED
from glimmer_jax.kilt.examples import answers
from glimmer_jax.vocabulary import question_text

# Training examples are dropped if all their answers have a lower `bleu_score`.
MIN_BLEU = 0.5


def answered_by_source(output: Mapping[str, Any], min_bleu: float) -> bool:
    """Whether the knowledge source holds the answer of this output.

    KILT mapped the provenance of older data sets to its own Wikipedia; `bleu_score` measures how
    well the mapped text matches the original. Outputs without scores are kept.
    """
    scores = [place.get("bleu_score") for place in output.get("provenance", [])]
    # The Hugging Face hub writes -1.0 where KILT has no score.
    known = [score for score in scores if score is not None and score >= 0]
    return not known or max(known) >= min_bleu


def example_features(line: Mapping[str, Any], min_bleu: float = 0.0) -> dict[str, Any] | None:
    """Features of one line of a retrieved file, as in the module docstring.

    Args:
      line: a checked example (`kilt.examples.read_examples`).
      min_bleu: drops answers with a lower `bleu_score`, from 0 to 1.

    Returns:
      The features, or None if it has no answer that reaches `min_bleu`.

    Raises:
      ValueError: the line has no `retrieved` field.
    """
    if "retrieved" not in line:
        raise ValueError(
            f"DATA_DIR: example {line['id']!r} has no `retrieved` passages. Run --run_mode=retrieve on "
            "the task file and set DATA_DIR to its output."
        )
    texts = answers(line)
    if min_bleu > 0:
        outputs = [
            output for output in line.get("output", []) if answered_by_source(output, min_bleu)
        ]
        texts = answers({"output": outputs})
        if not texts:
            return None
    return {
        "id": line["id"],
        "question": line["input"],
        "answers": texts,
        "passage_ids": [id_number(passage["id"]) for passage in line["retrieved"]],
        "gold_passages": [int(bool(passage.get("gold"))) for passage in line["retrieved"]],
    }


class Columns:
    """Features of examples in flat tensors, which save RAM: T-REx has 91 million passage ids."""

    def __init__(self, examples: Iterable[Mapping[str, Any]]):
        """Reads all examples, feature dictionaries of `example_features`."""
        ids: list[bytes] = []
        questions: list[bytes] = []
        answers: list[bytes] = []
        answer_counts = array("q")
        passage_ids = array("q")
        gold = array("b")
        passage_counts = array("q")
        for example in examples:
            ids.append(example["id"].encode("utf-8"))
            questions.append(example["question"].encode("utf-8"))
            answers += [answer.encode("utf-8") for answer in example["answers"]]
            answer_counts.append(len(example["answers"]))
            passage_ids.extend(example["passage_ids"])
            gold.extend(example["gold_passages"])
            passage_counts.append(len(example["passage_ids"]))
        self._size = len(ids)

        def ragged(values: tf.Tensor, counts: array) -> tf.RaggedTensor:
            return tf.RaggedTensor.from_row_lengths(values, np.asarray(counts, np.int64))

        self._columns = {
            "id": tf.constant(ids, tf.string),
            "question": tf.constant(questions, tf.string),
            "answers": ragged(tf.constant(answers, tf.string), answer_counts),
            "passage_ids": ragged(tf.constant(np.asarray(passage_ids, np.int64)), passage_counts),
            "gold_passages": ragged(tf.constant(np.asarray(gold, np.int32)), passage_counts),
        }

    def __len__(self) -> int:
        return self._size

    def dataset(self, order: Sequence[int] | np.ndarray | None = None) -> tf.data.Dataset:
        """A dataset of the examples, in their own order or that of the indices `order`."""
        columns = self._columns
        if order is not None:
            columns = {name: tf.gather(column, order) for name, column in columns.items()}
        return tf.data.Dataset.from_tensor_slices(columns)


@seqio.map_over_dataset(num_seeds=1)
def draw_answer(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Adds `inputs` (the question) and `targets` (one of its answers, or "" if it has none).

    The seed determines the answer: `EXAMPLE_SEED` in training streams, seqio's elsewhere. Every
    epoch draws new answers.
    """
    known = example["answers"]
    seed = example.get(EXAMPLE_SEED, seed)
    index = tf.random.stateless_uniform(
        [], seed, maxval=tf.maximum(tf.size(known), 1), dtype=tf.int32
    )
    drawn = tf.cond(tf.size(known) > 0, lambda: known[index], lambda: tf.constant(""))
    return {**example, "inputs": question_text(example["question"]), "targets": drawn}


def all_answers(text: str, example: Any = None, is_target: bool = False) -> Any:
    """seqio postprocessor: replaces a target with the list of all answers, keeps a prediction."""
    if not is_target:
        return text
    return [answer.decode("utf-8") for answer in example["answers"]]
