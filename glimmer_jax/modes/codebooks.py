"""Mode `codebooks`: a checkpoint with codebooks for a product-quantised memory, learnt from passages."""

import dataclasses

import jax

from glimmer_jax import codecs
from glimmer_jax.codecs import ProductQuantisation
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import codebooks, encoding
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.recipe import check_model
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import parameters, params_file
from glimmer_jax.weights.model_config import describe

# Tokens that the codebooks are tried on, at most: as many as they are learnt from would double the RAM.
_TRIED_TOKENS = 131072


def learn_codebooks(
    model: GlimmerModel,
    checkpoint_path: str,
    passages_dir: str,
    output_path: str,
    max_length: int,
    batch_size: int = 32,
    sample_tokens: int = 131072,
    iterations: int = 25,
    seed: int = 0,
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
) -> float:
    """Writes the checkpoint's parameters with codebooks; prints and returns what the codec loses.

    Args:
      model: with a memory encoder, and a codec that has codebooks (`pq`, `pq16`).
      checkpoint_path: any of the places of `weights.load`; codebooks that it has are learnt anew.
      passages_dir: the sample is drawn from here.
      output_path: a file `NAME.safetensors`; to train from, to build memory with, to read it.
      max_length: P, tokens of a passage.
      batch_size: passages a device encodes at once.
      sample_tokens: that the codebooks are learnt from, 4 D bytes of RAM each; they are tried on as many
        others, 131,072 at most.
      iterations: of k-means.
      seed: of the sample and of the start of k-means.
      mesh: devices of this process.
      vocabulary: that of the model.

    Raises:
      ValueError: missing settings, a model without memory, a codec without codebooks, a sample that is
        too small, or files that do not belong together.
    """
    checks.required(
        CHECKPOINT_PATH=checkpoint_path, PASSAGES_DIR=passages_dir, OUTPUT_PATH=output_path
    )
    params_file.check_name(output_path)
    check_model(model)
    codec = codecs.get(model.config.memory_codec)
    if not isinstance(codec, ProductQuantisation):
        raise ValueError(
            f"MEMORY_CODEC={model.config.memory_codec!r} has no codebooks to learn. Set it to pq or "
            "pq16, or build memory with the checkpoint as it is."
        )
    corpus = Passages.open(passages_dir, vocabulary.fingerprint)
    plain = GlimmerModel(
        dataclasses.replace(model.config, memory_codec="f32", train_codebooks=False)
    )
    host_params = parameters.load(checkpoint_path, plain, vocabulary.fingerprint)
    # Every process does the same on its own devices, and the first one writes.
    devices = make_mesh(mesh, jax.local_devices())
    params = parameters.place(host_params, plain, devices)
    sample = codebooks.sample_states(
        encoding.bind_states(plain.memory_states, params, devices),
        corpus,
        tokens=sample_tokens + min(sample_tokens, _TRIED_TOKENS),
        rows=batch_size,
        buckets=encoding.default_buckets(max_length),
        devices=devices.size,
        seed=seed,
    )
    # A small corpus may give fewer than were asked for; some are left to show what other passages lose.
    cut = min(sample_tokens, len(sample) - min(_TRIED_TOKENS, -(-len(sample) // 10)))
    if jax.process_index() == 0:
        groups = codec.num_subspaces(sample.shape[1])
        print(
            f"Learning the codebooks of {groups} subspaces from {cut} tokens, in {iterations} iterations "
            "each.",
            flush=True,
        )
    books = codebooks.learn(codec, sample[:cut], devices, iterations, seed)
    lost = codebooks.relative_error(codec, books, sample[cut:])
    if jax.process_index() == 0:
        tree = {**host_params, "memory_codebooks": books}
        params_file.save_params_file(
            output_path, tree, describe(model.config, vocabulary.fingerprint)
        )
        print(
            f"Wrote {output_path}: codebooks of {codec.name} from {cut} tokens; relative error "
            f"{lost:.4f} on {len(sample) - cut} others."
        )
    return lost
