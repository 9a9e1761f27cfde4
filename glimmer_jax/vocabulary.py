"""Text to token ids and back, and the text formats of questions and passages.

Passages carry no task text, so that one memory serves all tasks. A passage ends with the end token; a
question does not, because the passage follows it (GLIMMER, arXiv 2306.10231).

Special ids are T5's: padding 0, end 1, unknown above 1. SentencePiece's own defaults differ; train a
model for this project with

    SentencePieceTrainer.train(..., pad_id=0, eos_id=1, unk_id=2, bos_id=-1)

The built-in vocabulary has 1,948 SentencePiece pieces, trained by `pydocs.train_vocabulary`. Above the
pieces come 100 sentinels for span corruption, numbered downwards from the largest id as in T5. A file
that has pieces `<extra_id_0>`, … of its own, such as mT5's, gets none on top.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import sentencepiece

from glimmer_jax.storage import local_copy


def question_text(task_input: Any) -> Any:
    """`question: …`, of a string or of a tensor of strings."""
    return "question: " + task_input


def passage_text(title: str, text: str) -> str:
    """`title: … context: …`."""
    return f"title: {title} context: {text}"


BUILT_IN = "pydocs"  # the name of the built-in vocabulary, in place of a path
PYDOCS_MODEL = Path(__file__).parent / "pydocs" / "vocabulary.model"
EXTRA_IDS = 100
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model file with sentinels: text to ids and back.

    Attributes:
      path: the SentencePiece model file, for a bucket's its local copy; `pydocs` for the built-in one.
      extra_ids: number of sentinels, on top of the pieces unless the file has its own.
    """

    path: str | Path
    extra_ids: int = EXTRA_IDS

    def __post_init__(self) -> None:
        path = PYDOCS_MODEL if self.path == BUILT_IN else self.path
        object.__setattr__(self, "path", local_copy.fetch_file("VOCABULARY", path))
        if not Path(self.path).is_file():
            raise ValueError(
                f"VOCABULARY: no file {self.path}. Give the path of a SentencePiece model, or "
                f"{BUILT_IN!r} for that of the built-in corpus."
            )
        if self.extra_ids < 0:
            raise ValueError(f"extra_ids must be at least 0, got {self.extra_ids}.")

    @functools.cached_property
    def processor(self) -> Any:
        """The SentencePiece processor, loaded on first use.

        Raises ValueError where the file is no model, or its special ids do not fit.
        """
        loaded = sentencepiece.SentencePieceProcessor()
        try:
            loaded.LoadFromSerializedProto(Path(self.path).read_bytes())
            # Pieces are decoded when they are asked for, and damaged ones may not be UTF-8.
            loaded.IdToPiece(list(range(loaded.GetPieceSize())))
        except (RuntimeError, OSError, UnicodeDecodeError, MemoryError) as error:
            raise ValueError(
                f"VOCABULARY: {self.path} is not a SentencePiece model ({error}). Give one, such as T5's "
                "spiece.model."
            ) from None
        pad, eos, unk = loaded.pad_id(), loaded.eos_id(), loaded.unk_id()
        if pad != PAD_ID or eos != EOS_ID or unk <= EOS_ID:
            raise ValueError(
                f"VOCABULARY: {self.path} must have pad_id={PAD_ID}, eos_id={EOS_ID} and unk_id above "
                f"them, got pad_id={pad}, eos_id={eos} and unk_id={unk}. Train it with "
                "SentencePieceTrainer.train(..., pad_id=0, eos_id=1, unk_id=2, bos_id=-1)."
            )
        return loaded

    @functools.cached_property
    def has_own_sentinels(self) -> bool:
        """Whether the file has a piece `<extra_id_0>`."""
        return bool(self.processor.PieceToId("<extra_id_0>") != self.unk_id)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Pieces and sentinels together: the smallest number above every id."""
        return int(self.processor.GetPieceSize()) + self._added_ids

    @property
    def _added_ids(self) -> int:
        return 0 if self.has_own_sentinels else self.extra_ids

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return PAD_ID

    @property
    def eos_id(self) -> int:
        """Id of the end token."""
        return int(self.processor.eos_id())

    @property
    def unk_id(self) -> int:
        """Id of the unknown token."""
        return int(self.processor.unk_id())

    @functools.cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of the model file and the number of sentinels."""
        digest = hashlib.sha256(Path(self.path).read_bytes())
        digest.update(f"extra_ids={self.extra_ids}".encode())
        return f"sha256:{digest.hexdigest()}"

    def sentinel(self, index: int) -> int:
        """Id of `<extra_id_{index}>`. Raises ValueError for an index without a sentinel."""
        if not 0 <= index < len(self._sentinels):
            raise ValueError(
                f"Sentinels are numbered 0 to {len(self._sentinels) - 1}, got {index}."
            )
        return self._sentinels[index]

    @functools.cached_property
    def _sentinels(self) -> list[int]:
        if not self.has_own_sentinels:
            return [self.vocab_size - 1 - index for index in range(self.extra_ids)]
        names = (f"<extra_id_{index}>" for index in range(self.extra_ids))
        ids = (int(self.processor.PieceToId(name)) for name in names)
        return list(itertools.takewhile(lambda token: token != self.unk_id, ids))

    def words(self) -> list[str]:
        """Pieces of two or more letters, digits and underscores, without the mark of a word's start."""
        pieces = map(self.processor.IdToPiece, range(self.processor.GetPieceSize()))
        bare = {piece.removeprefix("\u2581") for piece in pieces}
        return sorted(piece for piece in bare if re.fullmatch(r"\w{2,}", piece))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end token."""
        return list(self.processor.EncodeAsIds(text))

    def decode(self, ids: Any) -> str:
        """Text of ids up to the first end token, without padding, sentinels as `<extra_id_N>`.

        Raises ValueError for an id outside the vocabulary.
        """
        sentinels = {token: index for index, token in enumerate(self._sentinels)}
        parts: list[str] = []
        run: list[int] = []
        for token in (int(token) for token in ids):
            if token == self.eos_id:
                break
            if token == PAD_ID:
                continue
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"Token id {token} is outside the vocabulary {self.path} of {self.vocab_size} ids. "
                    "Give VOCABULARY the model's own; an untrained model may also predict such ids."
                )
            if token not in sentinels:
                run.append(token)
                continue
            parts += [self.processor.DecodeIds(run), f"<extra_id_{sentinels[token]}>"]
            run = []
        parts.append(self.processor.DecodeIds(run))
        return " ".join(part for part in parts if part)

    def seqio(self) -> Any:
        """The same vocabulary, with the same ids, for seqio's features (imports seqio)."""
        import seqio

        return seqio.SentencePieceVocabulary(str(self.path), extra_ids=self._added_ids)
