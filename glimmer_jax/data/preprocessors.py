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

from collections.abc import Iterable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from glimmer_jax.kilt import answers
from glimmer_jax.text import question_text

# Training pairs whose provenance matches the knowledge source less than this are left out.
MIN_BLEU = 0.5


def answered_by_source(output: Mapping[str, Any], min_bleu: float) -> bool:
    """Whether the knowledge source holds this output's answer.

    KILT mapped older data sets onto its own Wikipedia and wrote down in `bleu_score` how well each
    provenance was found again. An output without such scores is trusted.
    """
    scores = [one.get("bleu_score") for one in output.get("provenance", [])]
    known = [score for score in scores if score is not None]
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
        "passage_ids": [one["id"] for one in line["retrieved"]],
        "gold_passages": [int(bool(one.get("gold"))) for one in line["retrieved"]],
    }


def to_dataset(examples: Iterable[Mapping[str, Any]]) -> tf.data.Dataset:
    """Feature dictionaries of `example_features` -> a dataset of them, held in memory."""
    rows = list(examples)

    def column(name: str) -> list[Any]:
        return [row[name] for row in rows]

    def ragged(name: str, dtype: tf.DType) -> tf.RaggedTensor:
        # tf.ragged.constant would take seconds for ten thousand rows.
        flat = tf.constant([one for row in column(name) for one in row], dtype)
        return tf.RaggedTensor.from_row_lengths(flat, [len(row) for row in column(name)])

    return tf.data.Dataset.from_tensor_slices(
        {
            "id": tf.constant(column("id"), tf.string),
            "question": tf.constant(column("question"), tf.string),
            "answers": ragged("answers", tf.string),
            "passage_ids": ragged("passage_ids", tf.int64),
            "gold_passages": ragged("gold_passages", tf.int32),
        }
    )


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
