"""Mode `build_memory`: layers [0, M) over every passage, into a memory store."""

import jax
import jax.numpy as jnp

from glimmer_jax.memory import build
from glimmer_jax.memory.estimate import matmul_rate
from glimmer_jax.memory.fingerprint import passages_fingerprint
from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.memory_encoder import load_encoder, open_corpus
from glimmer_jax.modes.settings import EncoderConfig
from glimmer_jax.partitioning import MeshConfig, make_mesh


def build_memory(
    encoder: EncoderConfig,
    memory_dir: str,
    config: build.BuildConfig = build.BuildConfig(),
    measure_error: bool = True,
) -> build.Report:
    """Builds the store at `memory_dir`, or resumes the build; prints progress and rates.

    Args:
      encoder: the checkpoint, and the passages that it encodes.
      memory_dir: a folder or a TensorStore URL.
      config: shards, builders, and whether shards of another program are accepted.
      measure_error: compare a sample with float32, and record the error in the manifest.

    Raises:
      ValueError: missing settings, files that are damaged or do not belong together, or a model
        without memory.
    """
    encoder.check_given()
    checks.required(MEMORY_DIR=memory_dir)
    trained, corpus = open_corpus(encoder)
    model = trained.model
    memory_encoder, reference = load_encoder(encoder, trained, corpus)
    report = build.build_memory(
        memory_encoder,
        corpus,
        memory_dir,
        passages_fingerprint=passages_fingerprint(corpus.manifest),
        config=config,
        reference=reference if measure_error else None,
        matmul_bound=_matmul_bound(model, encoder.mesh),
    )
    manifest = report.manifest
    if manifest is None:
        print(
            f"{memory_dir}: builder {config.builders.index} of {config.builders.count} built "
            f"{report.built} shards and found {report.skipped}; the first builder finishes the store."
        )
        return report
    print(
        f"{memory_dir}: {manifest.num_passages} passages, {manifest.num_tokens} tokens, "
        f"{manifest.num_bytes / 2**20:.1f} MiB; {report.built} shards built, {report.skipped} found; "
        f"{report.passages_per_s:.1f} passages/s ({report.fraction_of_peak:.0%} of the matmul bound), "
        f"{manifest.truncated} cut at {memory_encoder.identity.max_length} tokens."
    )
    if manifest.codec_error is not None:
        print(f"Error of {model.config.memory_codec} against float32: {manifest.codec_error}")
    return report


def _matmul_bound(model: GlimmerModel, mesh: MeshConfig) -> float:
    """Upper bound of tokens per second: the matrix products of the encoder, and nothing else."""
    t5 = model.config.t5
    operands = str(jnp.dtype(t5.dtype if t5.operands is None else t5.operands))
    rate = matmul_rate(make_mesh(mesh, jax.local_devices()), operands)
    token = question_cost(model.config, passages=1, question=0, passage=1, answer=0)
    return rate / token.precompute
