"""Mode `codebooks`: learns the codebooks of a product-quantised memory from passages."""

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

# Maximum number of tokens that the error is measured on; as many as for training would double the RAM.
_TEST_TOKENS = 131072


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
    """Writes the checkpoint's parameters with codebooks. Prints and returns the codec's relative error.

    Args:
      model: has a memory encoder, and a codec with codebooks (`pq`, `pq16`).
      checkpoint_path: any path that `weights.load` reads; its codebooks are replaced.
      passages_dir: passages folder from which the sample is drawn.
      output_path: a file `NAME.safetensors` for training, for building memory and for reading it.
      max_length: P, tokens of a passage.
      batch_size: passages that a device encodes at once.
      sample_tokens: tokens that the codebooks are learnt from, 4 D bytes of RAM each. The error is
        measured on as many other tokens, at most 131,072.
      iterations: of k-means.
      seed: of the sample and of the initial centroids.
      mesh: devices of this process.
      vocabulary: that of the model.

    Raises:
      ValueError: settings are missing, the model has no memory, the codec has no codebooks, the sample is
        too small, or files do not belong together.
    """
    checks.required(
        CHECKPOINT_PATH=checkpoint_path, PASSAGES_DIR=passages_dir, OUTPUT_PATH=output_path
    )
    params_file.check_name(output_path)
    check_model(model)
    codec = codecs.get(model.config.memory_codec)
    if not isinstance(codec, ProductQuantisation):
        raise ValueError(
            f"MEMORY_CODEC={model.config.memory_codec!r} has no codebooks. Set it to pq or pq16, or "
            "build memory with the checkpoint as it is."
        )
    corpus = Passages.open(passages_dir, vocabulary.fingerprint)
    plain = GlimmerModel(
        dataclasses.replace(model.config, memory_codec="f32", train_codebooks=False)
    )
    host_params = parameters.load(checkpoint_path, plain, vocabulary.fingerprint)
    # Every process computes the same on its own devices; process 0 writes.
    devices = make_mesh(mesh, jax.local_devices())
    params = parameters.place(host_params, plain, devices)
    sample = codebooks.sample_states(
        encoding.bind_states(plain.memory_states, params, devices),
        corpus,
        tokens=sample_tokens + min(sample_tokens, _TEST_TOKENS),
        rows=batch_size,
        buckets=encoding.default_buckets(max_length),
        devices=devices.size,
        seed=seed,
    )
    # A small corpus may have fewer tokens than requested; at least a tenth is kept for the error.
    num_training = min(sample_tokens, len(sample) - min(_TEST_TOKENS, -(-len(sample) // 10)))
    if jax.process_index() == 0:
        groups = codec.num_subspaces(sample.shape[1])
        print(
            f"Learning the codebooks of {groups} subspaces from {num_training} tokens, in "
            f"{iterations} iterations each.",
            flush=True,
        )
    books = codebooks.learn(codec, sample[:num_training], devices, iterations, seed)
    error = codebooks.relative_error(codec, books, sample[num_training:])
    if jax.process_index() == 0:
        tree = {**host_params, "memory_codebooks": books}
        params_file.save_params_file(
            output_path, tree, describe(model.config, vocabulary.fingerprint)
        )
        print(
            f"Wrote {output_path}: codebooks of {codec.name} from {num_training} tokens; relative error "
            f"{error:.4f} on {len(sample) - num_training} others."
        )
    return error
