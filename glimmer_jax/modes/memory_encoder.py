"""Loads the memory encoder of a checkpoint, for the modes that build memory."""

import jax

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import codec_error, encoding
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.memory.manifest import EncodeProgram, Identity
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes.checkpoint import Trained
from glimmer_jax.modes.settings import EncoderConfig
from glimmer_jax.partitioning import make_mesh
from glimmer_jax.weights import parameters


def load_encoder(
    config: EncoderConfig, trained: Trained, corpus: Passages
) -> tuple[MemoryEncoder, encoding.States]:
    """The memory encoder, and a function that computes its states in float32, as a reference.

    Raises:
      ValueError: the checkpoint does not fit, or the model has no memory.
    """
    model, length = trained.model, config.passage_length(trained, corpus)
    # Each process encodes its own passages on its own devices.
    devices = make_mesh(config.mesh, jax.local_devices())
    vocabulary_fingerprint = trained.vocabulary.fingerprint
    host_params = parameters.load(config.checkpoint_path, model, vocabulary_fingerprint)
    params = parameters.place(host_params, model, devices)
    t5, codec = model.config.t5, model.config.memory_codec
    encoder = MemoryEncoder(
        encoding.bind_encoder(model.memory_states, params, devices, codec),
        Identity(
            encoder_fingerprint=encoder_fingerprint(host_params, model.config),
            vocabulary_fingerprint=vocabulary_fingerprint,
            codec=codec,
            emb_dim=t5.emb_dim,
            max_length=length,
        ),
        EncodeProgram(
            rows=config.batch_size,
            buckets=encoding.default_buckets(length),
            dtype=t5.dtype,
            matmul_dtype=t5.matmul_dtype,
            backend=jax.default_backend() + ("" if t5.attention == "plain" else f"+{t5.attention}"),
            jax_version=jax.__version__,
        ),
        devices.size,
        params.get("memory_codebooks"),
    )
    return encoder, encoding.bind_states(codec_error.exact_states(model), params, devices)


def check_model(model: GlimmerModel) -> None:
    """Raises ValueError for a model without memory."""
    if not model.config.memory_layers:
        raise ValueError(
            "MODEL has memory_layers=0 (FiD), so there is nothing to compute ahead of time. Use "
            "gin/models/lumen.gin or gin/models/glimmer.gin."
        )


def open_corpus(config: EncoderConfig) -> tuple[Trained, Passages]:
    """The checkpoint's records and the passages to encode, with every checksum verified.

    Damage must be detected here: a memory of damaged tokens looks like a valid one.

    Raises:
      ValueError: a setting is missing, the model has no memory, or PASSAGES_DIR is missing, damaged, or
        has another vocabulary.
    """
    config.check_given()
    if config.model is not None:
        check_model(config.model)
    trained = config.read()
    check_model(trained.model)
    corpus = Passages.open(str(config.passages_dir), trained.vocabulary.fingerprint)
    corpus.verify()
    return trained, corpus
