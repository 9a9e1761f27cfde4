"""Model, lengths and vocabulary from a checkpoint, unless settings replace them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from glimmer_jax.axes import check_lengths
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.modes import checks, early
from glimmer_jax.vocabulary import PYDOCS_MODEL, Vocabulary
from glimmer_jax.weights.find_vocabulary import vocabulary_of
from glimmer_jax.weights.load import Recorded, read_record, with_codec


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A trained model, and the settings that replace what its checkpoint records."""

    # A run, one of its steps, a `.safetensors` file or a T5, of any cut.
    checkpoint_path: str | None
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
        model = self.model
        if model is None:
            model = GlimmerModel(record.answering_config(memory_dir), decode=self.decode)
        config = model.config
        if self.memory_codec is not None:
            config = with_codec(config, self.memory_codec)
        if self.num_kept != "checkpoint":
            config = dataclasses.replace(config, num_kept=self.num_kept)
        model = model.with_config(config)
        vocabulary = vocabulary_of(model, self.vocabulary, record, str(self.checkpoint_path))
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
        lengths = self.record.task_feature_lengths if given is None else given
        if lengths is None:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS is required: {self.record.what} does not record the lengths that "
                "it was trained with. Set --gin.TASK_FEATURE_LENGTHS=\"{'inputs': 48, 'targets': 32, "
                "'passages': (40, 304)}\"."
            )
        return check_lengths(lengths).as_features()
