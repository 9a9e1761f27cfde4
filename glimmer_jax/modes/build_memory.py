"""Mode `build_memory`: layers [0, M) over every passage, into a memory store."""

import dataclasses

from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.memory import build, compute
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.passages import Passages
from glimmer_jax.weights import parameters


def build_memory(
    model: GlimmerModel,
    checkpoint_path: str,
    passages_dir: str,
    memory_dir: str,
    max_length: int,
    batch_size: int = 32,
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
    shard_passages: int = 1024,
    measure_error: bool = True,
    accept_other_program: bool = False,
) -> build.Report:
    """Builds the store at `memory_dir`, or goes on with it; prints progress and rates.

    Args:
      model: with a memory encoder (LUMEN or GLIMMER).
      checkpoint_path: a run's folder, a step's, or a `.safetensors` file.
      passages_dir: written by mode `passages`.
      memory_dir: a folder or a TensorStore URL.
      max_length: P, tokens of a passage.
      batch_size: passages a device encodes at once.
      mesh: devices.
      vocabulary: that of the model.
      shard_passages: passages a shard.
      measure_error: compare a sample with float32, and record it in the manifest.
      accept_other_program: go on with shards that another program (rows, backend) has made.

    Raises:
      ValueError: missing settings, files that do not belong together, or a model without memory.
    """
    checks.required(
        CHECKPOINT_PATH=checkpoint_path, PASSAGES_DIR=passages_dir, MEMORY_DIR=memory_dir
    )
    if not model.config.memory_layers:
        raise ValueError(
            "This model has memory_layers=0 (FiD): there is nothing to compute ahead of time. Build "
            "memory with gin/models/lumen.gin or gin/models/glimmer.gin."
        )
    corpus = Passages.open(passages_dir, vocabulary.fingerprint)
    devices = make_mesh(mesh)
    host_params = parameters.load(checkpoint_path, model, vocabulary.fingerprint)
    params = parameters.place(host_params, model, devices)
    reference = None
    if measure_error:
        t5 = dataclasses.replace(model.config.t5, dtype="float32")
        exact = GlimmerModel(dataclasses.replace(model.config, t5=t5, memory_codec="f32"))
        reference = compute.bind_encoder(exact.encode_memory, params, devices)
    report = build.build_memory(
        compute.bind_encoder(model.encode_memory, params, devices),
        corpus,
        memory_dir,
        codec=model.config.memory_codec,
        emb_dim=model.config.t5.emb_dim,
        encoder_fingerprint=encoder_fingerprint(host_params, model.config),
        vocabulary_fingerprint=vocabulary.fingerprint,
        max_length=max_length,
        batch_size=batch_size,
        devices=devices.size,
        dtype=model.config.t5.dtype,
        shard_passages=shard_passages,
        reference=reference,
        accept_other_program=accept_other_program,
    )
    made = report.manifest
    print(
        f"{memory_dir}: {made.num_passages} passages, {made.num_tokens} tokens, "
        f"{made.num_bytes / 2**20:.1f} MiB; {report.built} shards built, {report.skipped} found; "
        f"{report.passages_per_s:.1f} passages/s, {made.truncated} cut at {max_length} tokens."
    )
    if made.codec_error is not None:
        print(f"Error of {model.config.memory_codec} against float32: {made.codec_error}")
    return report
