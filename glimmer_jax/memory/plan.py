"""What a memory would cost, before anything runs."""

from typing import Any

import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory.identity import Layout
from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.glimmer import GlimmerConfig

# Id, offset and digest of a passage, and a title of usual length.
_INDEX_BYTES = 8 + 8 + 8 + 24
# Checksum and index entry of a chunk.
_CHUNK_BYTES = 20
# Zarr's metadata of an array.
_METADATA_BYTES = 440
# Arrays of a shard that are not the codec's.
_INDEX_ARRAYS = 4


def plan(
    config: GlimmerConfig,
    *,
    passages: int,
    tokens: float,
    layout: Layout,
    device_tflops: float,
) -> dict[str, Any]:
    """Sizes and time of the memory of a corpus, by arithmetic alone.

    Args:
      config: the model's; its cut and its codec.
      passages: of the corpus.
      tokens: of a passage, on average.
      layout: how it is cut.
      device_tflops: what a device sustains, in 10^12 floating-point operations a second.

    Raises:
      ValueError: numbers that are not positive, or a model without memory.
    """
    if min(passages, tokens, device_tflops) <= 0 or not config.memory_layers:
        raise ValueError(
            "A plan needs a model with memory layers and positive numbers; got memory_layers="
            f"{config.memory_layers}, {passages} passages of {tokens} tokens, {device_tflops} "
            "TFLOP/s. Set NUM_PASSAGES or PASSAGES_DIR, PASSAGE_TOKENS and DEVICE_TFLOPS."
        )
    codec = codecs.get(config.memory_codec)
    specs = codec.array_specs(config.t5.emb_dim)
    token = sum(int(np.prod(trailing)) * dtype.itemsize for trailing, dtype in specs.values())
    shards = -(-passages // layout.shard_passages)
    chunks = passages * tokens / layout.chunk_tokens * len(specs)
    cost = question_cost(config, passages=1, question=0, passage=1, answer=0)
    arrays = shards * (_INDEX_ARRAYS + len(specs))
    size = passages * (tokens * token + _INDEX_BYTES) + chunks * _CHUNK_BYTES
    # The paper counts a multiply-add as one.
    token_cost = cost.precompute + codec.encode_cost(config.t5.emb_dim)
    operations = 2 * token_cost * passages * tokens
    return {
        "passages": passages,
        "tokens": int(passages * tokens),
        "codec": config.memory_codec,
        "bytes_per_token": token,
        "bytes": int(size + arrays * _METADATA_BYTES),
        "shards": shards,
        # Metadata and data of each array, the record of each shard, and the manifest.
        "files": 2 * arrays + shards + 1,
        "shard_bytes": int(min(layout.shard_passages, passages) * tokens * token),
        "device_hours": float(f"{operations / (device_tflops * 1e12) / 3600:.4g}"),
    }
