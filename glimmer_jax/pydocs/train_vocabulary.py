"""Trains the built-in SentencePiece vocabulary on the training modules of the built-in corpus.

Dots, underscores and opening brackets are separate pieces, digits are split, and unknown characters
fall back to bytes. A model can therefore copy qualified names that training never saw, piece by
piece.

    python -m glimmer_jax.pydocs.train_vocabulary [path]
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from glimmer_jax.pydocs import corpus, questions
from glimmer_jax.vocabulary import (
    EOS_ID,
    EXTRA_IDS,
    PAD_ID,
    PYDOCS_MODEL,
    UNK_ID,
    passage_text,
    question_text,
)

# 2,048 rows with the sentinels: a multiple of 128, which divides over a mesh.
NUM_PIECES = 2048 - EXTRA_IDS


def training_text() -> Iterator[str]:
    """Yields passages, questions and answers of the training modules."""
    for record in corpus.train_texts():
        yield passage_text(record["title"], record["text"])
    for (_, split), examples in questions.all_tasks().items():
        if split == "train":
            for example in examples:
                yield question_text(example["input"])
                yield example["output"][0]["answer"]


def train_vocabulary(path: str | Path = PYDOCS_MODEL, num_pieces: int = NUM_PIECES) -> Path:
    """Trains the vocabulary on the training modules of the running Python, and writes it to `path`.

    Args:
      path: the SentencePiece model file.
      num_pieces: number of pieces, without sentinels.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(),
        model_writer=model,
        model_type="unigram",
        vocab_size=num_pieces,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=[".", "_", "("],
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        bos_id=-1,
        # Decoding must restore the text exactly.
        normalization_rule_name="identity",
        max_sentence_length=10000,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(path)
    path.write_bytes(model.getvalue())
    return path


if __name__ == "__main__":
    print(train_vocabulary(sys.argv[1] if len(sys.argv) > 1 else PYDOCS_MODEL))
