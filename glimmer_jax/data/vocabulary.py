"""The project's SentencePiece vocabulary: about two thousand pieces, made from training text alone.

Dots, underscores and opening brackets are pieces of their own, digits are single, and what no
piece spells falls back to bytes: so a qualified name never seen in training is still copied piece by
piece. On top of the pieces stand 100 sentinels for span corruption, numbered downwards from the
largest id as in T5.

    python -m glimmer_jax.data.vocabulary [path]      # makes the file again
"""

import dataclasses
import functools
import hashlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from glimmer_jax import fetch
from glimmer_jax.text import passage_text, question_text

PYDOCS_MODEL = Path(__file__).parent / "pydocs.model"
EXTRA_IDS = 100
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
# With the sentinels a multiple of 128, which splits over a mesh.
NUM_PIECES = 2048 - EXTRA_IDS


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model file with sentinels on top: text to ids and back.

    Attributes:
      path: the SentencePiece model file, of a bucket's its copy here; None for the built-in one.
      extra_ids: number of sentinels; `<extra_id_0>` has the largest id.
    """

    path: str | Path = PYDOCS_MODEL
    extra_ids: int = EXTRA_IDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", fetch.fetch_file("VOCABULARY", self.path or PYDOCS_MODEL))
        if not Path(self.path).is_file():
            raise ValueError(
                f"No vocabulary file {self.path}. Give the path of a SentencePiece model, or leave "
                "it out for the built-in one."
            )
        if self.extra_ids < 0:
            raise ValueError(f"extra_ids must be 0 or more, got {self.extra_ids}.")

    @functools.cached_property
    def processor(self) -> Any:
        """The SentencePiece processor, loaded when first needed."""
        loaded = sentencepiece.SentencePieceProcessor()
        try:
            loaded.LoadFromSerializedProto(Path(self.path).read_bytes())
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a SentencePiece model ({error}). Give one, such as T5's "
                "spiece.model."
            ) from None
        return loaded

    @functools.cached_property
    def vocab_size(self) -> int:
        """Pieces and sentinels together: the smallest number above every id."""
        return int(self.processor.GetPieceSize()) + self.extra_ids

    @property
    def pad_id(self) -> int:
        return PAD_ID

    @property
    def eos_id(self) -> int:
        return int(self.processor.eos_id())

    @functools.cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of the model file and the number of sentinels."""
        digest = hashlib.sha256(Path(self.path).read_bytes())
        digest.update(f"extra_ids={self.extra_ids}".encode())
        return f"sha256:{digest.hexdigest()}"

    def sentinel(self, index: int) -> int:
        """Id of `<extra_id_{index}>`. Raises ValueError outside 0..extra_ids-1."""
        if not 0 <= index < self.extra_ids:
            raise ValueError(f"Sentinels go from 0 to {self.extra_ids - 1}, got {index}.")
        return self.vocab_size - 1 - index

    def words(self) -> list[str]:
        """Pieces of two or more letters, digits and underscores, without the mark of a word's start."""
        pieces = map(self.processor.IdToPiece, range(self.processor.GetPieceSize()))
        bare = {piece.removeprefix("\u2581") for piece in pieces}
        return sorted(piece for piece in bare if re.fullmatch(r"\w{2,}", piece))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end token."""
        return list(self.processor.EncodeAsIds(text))

    def decode(self, ids: Any) -> str:
        """Text of ids: up to the first end token, padding left out, sentinels spelled."""
        size = self.vocab_size - self.extra_ids
        parts: list[str] = []
        run: list[int] = []
        for one in (int(x) for x in ids):
            if one == self.eos_id:
                break
            if one == PAD_ID:
                continue
            if one < size:
                run.append(one)
                continue
            parts += [self.processor.DecodeIds(run), f"<extra_id_{self.vocab_size - 1 - one}>"]
            run = []
        parts.append(self.processor.DecodeIds(run))
        return " ".join(part for part in parts if part)

    def seqio(self) -> Any:
        """The same vocabulary, with the same ids, for seqio's features (imports seqio)."""
        import seqio

        return seqio.SentencePieceVocabulary(str(self.path), extra_ids=self.extra_ids)


def training_text() -> Iterator[str]:
    """Lines the vocabulary is made from: passages and questions of the training modules alone."""
    from glimmer_jax.data import pydocs, pydocs_tasks

    for record in pydocs.train_texts():
        yield passage_text(record["title"], record["text"])
    for (_, split), examples in pydocs_tasks.all_tasks().items():
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
