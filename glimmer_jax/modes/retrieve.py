"""Mode `retrieve`: BM25 gives every question of task files its passages."""

from glimmer_jax.modes import checks
from glimmer_jax.retrieval.bm25 import Bm25Config, retrieve_files


def retrieve(
    passages_dir: str,
    questions: str,
    data_dir: str,
    num_passages: int,
    bm25: Bm25Config = Bm25Config(),
    train_split: str = "train",
) -> None:
    """Writes each task file with `retrieved` into `data_dir`, and prints recall.

    Args:
      passages_dir: written by mode `passages`.
      questions: pattern of task files, such as `data/questions/*.jsonl`.
      data_dir: gets files of the same names; tasks read them from there.
      num_passages: K, passages of a question.
      bm25: settings of the index.
      train_split: files of this split see passages of this split only, where passages have one.

    Raises:
      ValueError: missing settings or files, or bad lines.
    """
    checks.required(PASSAGES_DIR=passages_dir, QUESTIONS=questions, DATA_DIR=data_dir)
    retrieve_files(passages_dir, questions, data_dir, num_passages, bm25, train_split)
