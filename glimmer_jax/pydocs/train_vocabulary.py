"""Trains the built-in SentencePiece vocabulary on the training modules of the built-in corpus.

Dots, underscores and opening brackets are pieces of their own, digits are split, and unknown
characters fall back to bytes, so a qualified name that training never saw is still copied piece by
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

# 2,048 rows with the sentinels: a multiple of 128, which divides evenly over a mesh.
NUM_PIECES = 2048 - EXTRA_IDS


def training_text() -> Iterator[str]:
    """Lines the vocabulary is made from: passages and questions of the training modules alone."""
    for record in corpus.train_texts():
        yield passage_text(record["title"], record["text"])
    for (_, split), examples in questions.all_tasks().items():
        if split == "train":
            for example in examples:
                yield question_text(example["input"])
                yield example["output"][0]["answer"]


def train_vocabulary(path: str | Path = PYDOCS_MODEL, num_pieces: int = NUM_PIECES) -> Path:
    """Makes the SentencePiece model from the training modules of the running Python."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(),
        model_writer=written,
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
        # Text must come back as it went in.
        normalization_rule_name="identity",
        max_sentence_length=10000,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(path)
    path.write_bytes(written.getvalue())
    return path


if __name__ == "__main__":
    print(train_vocabulary(sys.argv[1] if len(sys.argv) > 1 else PYDOCS_MODEL))
