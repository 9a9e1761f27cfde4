"""Mode `codebooks`: learns the codebooks of a product-quantised memory from passages."""

import dataclasses

import jax

from glimmer_jax import codecs
from glimmer_jax.codecs import ProductQuantisation
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import codebooks, encoding
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks, outputs
from glimmer_jax.modes.memory_encoder import check_model
from glimmer_jax.modes.settings import EncoderConfig
from glimmer_jax.partitioning import make_mesh
from glimmer_jax.weights import parameters, params_file
from glimmer_jax.weights.model_config import describe

# Maximum number of tokens that the error is measured on; as many as for training would double the
# RAM.
_TEST_TOKENS = 131072


def learn_codebooks(
    encoder: EncoderConfig,
    output_path: str,
    sample_tokens: int = 131072,
    iterations: int = 25,
    seed: int = 0,
    overwrite: bool = False,
) -> float | None:
    """Writes the checkpoint's parameters with codebooks; prints and returns the codec's error.

    Returns None if an earlier attempt of the same command had written them already.

    Args:
      encoder: a checkpoint whose codec has codebooks (`pq`), and the passages to sample.
        Codebooks that the checkpoint has are replaced.
      output_path: a file `NAME.safetensors`, for training, building memory and answering.
      sample_tokens: tokens that the codebooks are learned from, 4 D bytes of RAM each. As many
        others are held out to measure the error, 131,072 at most.
      iterations: of k-means.
      seed: of the sample and of the initial centroids.
      overwrite: replace an existing file.

    Raises:
      ValueError: missing settings, a model without memory, a codec without codebooks, a sample that
        is too small, files that do not belong together, or `output_path` exists.
    """
    encoder.check_given()
    checks.required(OUTPUT_PATH=output_path)
    checks.seed(seed)
    place = outputs.params_file_place(output_path, overwrite)
    place.check_early()
    trained = encoder.read()
    model, fingerprint = trained.model, trained.vocabulary.fingerprint
    check_model(model)
    codec = codecs.get(model.config.memory_codec)
    if not isinstance(codec, ProductQuantisation):
        raise ValueError(
            f"MEMORY_CODEC={model.config.memory_codec!r} has no codebooks. Set it to pq, or "
            "build memory with the checkpoint as it is."
        )
    corpus = Passages.open(str(encoder.passages_dir), fingerprint)
    with outputs.sole_writer(place) as held:
        if held.complete:
            return None
        plain = GlimmerModel(
            dataclasses.replace(model.config, memory_codec="f32", train_codebooks=False)
        )
        host_params = parameters.load(encoder.checkpoint_path, plain, fingerprint)
        # Every process computes the same on its own devices; process 0 writes.
        devices = make_mesh(encoder.mesh, jax.local_devices())
        params = parameters.place(host_params, plain, devices)
        sample = codebooks.sample_states(
            encoding.bind_states(plain.memory_states, params, devices),
            corpus,
            tokens=sample_tokens + min(sample_tokens, _TEST_TOKENS),
            rows=encoder.batch_size,
            buckets=encoding.default_buckets(encoder.passage_length(trained, corpus)),
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
            described = describe(model.config, fingerprint, trained.record.task_feature_lengths)
            held.check_lock()
            params_file.save_params_file(output_path, tree, described, trained.own_vocabulary())
            print(
                f"Wrote {output_path}: codebooks of {codec.name} from {num_training} tokens; relative "
                f"error {error:.4f} on {len(sample) - num_training} others."
            )
    return error
