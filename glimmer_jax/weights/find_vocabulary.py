"""The vocabulary of a model: that of a setting, or that of a checkpoint."""

from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.vocabulary import BUILT_IN, Vocabulary
from glimmer_jax.weights.load import Recorded

_WHERE = (
    "A T5 folder of Hugging Face holds spiece.model; T5X's public T5 uses "
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model. "
    f"{BUILT_IN!r} is the vocabulary of the built-in corpus."
)


def vocabulary_of(
    model: GlimmerModel, given: Vocabulary | str | None, record: Recorded, checkpoint: str
) -> Vocabulary:
    """The vocabulary of a checkpoint's model, see `find_vocabulary`; raises ValueError unless it fits."""
    vocabulary = find_vocabulary(given, record, checkpoint)
    check_vocabulary_fits(model, vocabulary, is_recorded(vocabulary, record))
    return vocabulary


def find_vocabulary(
    given: Vocabulary | str | None, record: Recorded | None = None, checkpoint: str | None = None
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
        vocabulary = given if isinstance(given, Vocabulary) else Vocabulary(given)
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
    if fingerprint is None and record is not None and record.vocabulary_path is not None:
        fingerprint = Vocabulary(record.vocabulary_path).fingerprint
    if fingerprint is not None and vocabulary.fingerprint != fingerprint:
        raise ValueError(
            f"VOCABULARY: {vocabulary.path} has the fingerprint {vocabulary.fingerprint}, but the "
            f"checkpoint {checkpoint} has {fingerprint}. Set VOCABULARY to the checkpoint's vocabulary, "
            "or leave it out."
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


# T5's embeddings are padded to a multiple of this number of rows.
EMBEDDING_MULTIPLE = 128


def check_vocabulary_fits(
    model: GlimmerModel, vocabulary: Vocabulary, allow_unused: bool = False
) -> None:
    """Raises ValueError for a vocabulary that cannot be the model's.

    Its ids must lie within the embedding and fill it up to the padding, and its end token must be the
    model's.

    Args:
      model: the model.
      vocabulary: of tasks and passages.
      allow_unused: accept an embedding with more rows than the padded vocabulary.
    """
    rows, ids = model.config.t5.vocab_size, vocabulary.vocab_size
    if ids > rows:
        raise ValueError(
            f"VOCABULARY: {vocabulary.path} has {ids} ids, but the model's embedding has {rows} rows. "
            "Raise VOCAB_SIZE or give the model's vocabulary."
        )
    padded = -(-ids // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    if rows > padded and not allow_unused:
        raise ValueError(
            f"VOCABULARY: {vocabulary.path} has {ids} ids, which fill {padded} rows, but the model's "
            f"embedding has {rows}. It is probably not the model's vocabulary: set VOCABULARY to the "
            f"spiece.model of the checkpoint, or VOCAB_SIZE to {padded} for random parameters. If the "
            "rows are meant to be unused, set ALLOW_UNUSED_EMBEDDINGS = True when training."
        )
    if vocabulary.eos_id != model.eos_id:
        raise ValueError(
            f"VOCABULARY: the end token of {vocabulary.path} is {vocabulary.eos_id}, but answers of "
            f"this model end with {model.eos_id}. Give a vocabulary with T5's ids: padding 0, end 1."
        )
