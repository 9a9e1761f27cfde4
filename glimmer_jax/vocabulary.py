"""Text to token ids and back, and the fixed text of questions and passages.

Passages never carry task text: one memory serves all tasks. A passage is followed by the end token;
a question is not, because the passage follows it (GLIMMER, arXiv 2306.10231).

The built-in vocabulary has 1,948 SentencePiece pieces and, above them, 100 sentinels for span
corruption, numbered downwards from the largest id as in T5. `pydocs.train_vocabulary` made it.
"""

import dataclasses
import functools
import hashlib
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


PYDOCS_MODEL = Path(__file__).parent / "pydocs" / "vocabulary.model"
EXTRA_IDS = 100
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


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
        object.__setattr__(
            self, "path", local_copy.fetch_file("VOCABULARY", self.path or PYDOCS_MODEL)
        )
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
