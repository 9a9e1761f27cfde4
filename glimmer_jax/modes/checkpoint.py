"""What the modes take from a checkpoint: model, lengths and vocabulary, unless settings replace them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.memory import versions
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.modes import checks, early
from glimmer_jax.storage import folder
from glimmer_jax.vocabulary import BUILT_IN, PYDOCS_MODEL, Vocabulary
from glimmer_jax.weights.load import Recorded, read_record

_WHERE = (
    "A T5 folder of Hugging Face holds spiece.model; T5X's public T5 uses "
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model. "
    f"{BUILT_IN!r} is the vocabulary of the built-in corpus."
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A trained model, and the settings that replace what its checkpoint records."""

    checkpoint_path: (
        str | None
    )  # a run, one of its steps, a `.safetensors` file or a T5, of any cut
    model: GlimmerModel | None = None  # None: the checkpoint's
    # M of the K retrieved passages that are kept; None keeps all.
    num_kept: int | Literal["checkpoint"] | None = "checkpoint"
    memory_codec: str | None = None  # None: the memory's, or else the checkpoint's
    vocabulary: str | None = None  # None: the checkpoint's; `Vocabulary.path`
    # Of the checkpoint's model; a given one has its own.
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)

    def read(self, memory_dir: str | None = None) -> "Trained":
        """Reads the checkpoint's records and applies the settings; reads no parameter.

        Args:
          memory_dir: a memory that the model reads.

        Raises:
          ValueError: there is no checkpoint or no vocabulary, they do not belong together, or the
            model is not recorded.
        """
        checks.required(CHECKPOINT_PATH=self.checkpoint_path)
        early.existing_checkpoint("CHECKPOINT_PATH", str(self.checkpoint_path))
        record = read_record(self.checkpoint_path)
        model, codec = self.model, self.memory_codec
        if model is None:
            model = GlimmerModel(record.answering_config(), decode=self.decode)
            if codec is None and memory_dir is not None:
                codec = versions.read_manifest(folder.open_folder(memory_dir)).identity.codec
        changes: dict[str, Any] = {}
        if self.num_kept != "checkpoint":
            changes["num_kept"] = self.num_kept
        if codec is not None and codec != model.config.memory_codec:
            changes |= {"memory_codec": codec, "train_codebooks": False}
        if changes:
            config = dataclasses.replace(model.config, **changes)
            model = GlimmerModel(config, model.loss, model.decode, eos_id=model.eos_id)
        vocabulary = find_vocabulary(self.vocabulary, record, str(self.checkpoint_path))
        own = is_recorded(vocabulary, record)
        checks.vocabulary_fits(model, vocabulary, allow_unused=own)
        return Trained(model, vocabulary, record)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint's model with the settings of the mode, its vocabulary and its records."""

    model: GlimmerModel
    vocabulary: Vocabulary
    record: Recorded

    def own_vocabulary(self) -> bytes | None:
        """The SentencePiece model; None if it is the built-in one, which needs no copy."""
        if self.vocabulary.path == PYDOCS_MODEL:
            return None
        return Path(self.vocabulary.path).read_bytes()

    def feature_lengths(self, given: Any | None) -> dict[str, Any]:
        """`given`, or the TASK_FEATURE_LENGTHS that the checkpoint records.

        Raises:
          ValueError: neither is known, or they are malformed.
        """
        lengths = given or self.record.task_feature_lengths
        if lengths is None:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS is required: {self.record.what} does not record the lengths that "
                "it was trained with. Set --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 48, 'targets': 32, "
                "'passages': (40, 304)}\"."
            )
        checked: Lengths = check_lengths(lengths)
        return {
            "inputs": checked.question,
            "targets": checked.target,
            "passages": (checked.passages, checked.passage),
        }


def find_vocabulary(
    given: str | None, record: Recorded | None = None, checkpoint: str | None = None
) -> Vocabulary:
    """The vocabulary of the setting VOCABULARY, or that of a checkpoint.

    Args:
      given: VOCABULARY.
      record: what the checkpoint records; None if there is none.
      checkpoint: its path, for messages.

    Raises:
      ValueError: no vocabulary is known, or it is not the one that the checkpoint records.
    """
    fingerprint = None if record is None else record.vocabulary_fingerprint
    if given is not None:
        vocabulary = Vocabulary(given)
    elif record is not None and record.vocabulary_path is not None:
        vocabulary = Vocabulary(record.vocabulary_path)
    elif fingerprint is not None and fingerprint == Vocabulary(BUILT_IN).fingerprint:
        return Vocabulary(BUILT_IN)
    else:
        why = "no checkpoint provides one"
        if record is not None:
            why = f"the checkpoint {checkpoint} has no spiece.model"
            if fingerprint is not None:
                why += f" and was trained with {fingerprint}"
        raise ValueError(
            f"VOCABULARY is required: {why}. Set it to the model's SentencePiece file, such as "
            f"--gin.VOCABULARY=\"'t5/spiece.model'\". {_WHERE}"
        )
    if fingerprint is not None and vocabulary.fingerprint != fingerprint:
        raise ValueError(
            f"VOCABULARY: {vocabulary.path} has the fingerprint {vocabulary.fingerprint}, but the "
            f"checkpoint {checkpoint} was trained with {fingerprint}. Set VOCABULARY to the checkpoint's "
            "vocabulary."
        )
    return vocabulary


def is_recorded(vocabulary: Vocabulary, record: Recorded | None) -> bool:
    """Whether a checkpoint's fingerprint or its own file determines the vocabulary."""
    if record is None:
        return False
    if record.vocabulary_fingerprint is not None:
        return record.vocabulary_fingerprint == vocabulary.fingerprint
    beside = record.vocabulary_path
    return beside is not None and Vocabulary(beside).fingerprint == vocabulary.fingerprint
