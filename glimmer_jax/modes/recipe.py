"""The encode step of a checkpoint, as the memory jobs want it."""

import jax

from glimmer_jax.memory import codec_error, encoding
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.memory.manifest import EncodeProgram, Identity
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.weights import parameters


def make_recipe(
    model: GlimmerModel,
    checkpoint_path: str,
    vocabulary_fingerprint: str,
    mesh: MeshConfig,
    max_length: int,
    batch_size: int,
) -> tuple[MemoryEncoder, encoding.States]:
    """How `model` with a checkpoint's parameters makes memory, and its float32 reference.

    Args:
      model: with a memory encoder (LUMEN or GLIMMER).
      checkpoint_path: a run's folder, a step's, or a `.safetensors` file.
      vocabulary_fingerprint: of the model's vocabulary.
      mesh: devices of this process.
      max_length: P, tokens of a passage.
      batch_size: passages a device encodes at once.

    Raises:
      ValueError: no checkpoint is given or it does not fit, or the model has no memory.
    """
    checks.required(CHECKPOINT_PATH=checkpoint_path)
    check_model(model)
    # Each process encodes passages of its own, on its own devices.
    devices = make_mesh(mesh, jax.local_devices())
    host_params = parameters.load(checkpoint_path, model, vocabulary_fingerprint)
    params = parameters.place(host_params, model, devices)
    t5, codec = model.config.t5, model.config.memory_codec
    recipe = MemoryEncoder(
        encoding.bind_encoder(model.memory_states, params, devices, codec),
        Identity(
            encoder_fingerprint=encoder_fingerprint(host_params, model.config),
            vocabulary_fingerprint=vocabulary_fingerprint,
            codec=codec,
            emb_dim=t5.emb_dim,
            max_length=max_length,
        ),
        EncodeProgram(
            rows=batch_size,
            buckets=encoding.default_buckets(max_length),
            dtype=t5.dtype,
            matmul_dtype=t5.matmul_dtype,
            backend=jax.default_backend() + ("+cudnn" if t5.attention == "cudnn" else ""),
            jax_version=jax.__version__,
        ),
        devices.size,
        params.get("memory_codebooks"),
    )
    return recipe, encoding.bind_states(codec_error.exact_states(model), params, devices)


def check_model(model: GlimmerModel) -> None:
    """Raises ValueError for a model without memory."""
    if not model.config.memory_layers:
        raise ValueError(
            "This model has memory_layers=0 (FiD): there is nothing to compute ahead of time. Build "
            "memory with gin/models/lumen.gin or gin/models/glimmer.gin."
        )
