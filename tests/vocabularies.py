"""Small SentencePiece models."""

import io
import pathlib

import sentencepiece

# As T5 has them.
SPECIAL_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def train_sentencepiece(path, sentences, **settings):
    """Trains a model into `path`; without SPECIAL_IDS its ids are SentencePiece's own."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=data,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    pathlib.Path(path).write_bytes(data.getvalue())
