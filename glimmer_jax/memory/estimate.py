"""Estimates: the size and cost of a memory before it is built, and an upper bound of a build's speed.

`plan` only computes. `matmul_rate` measures the devices; divided by the multiply-adds per token it
bounds the tokens per second of a build.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax import codecs
from glimmer_jax.memory.manifest import Layout
from glimmer_jax.memory.table import token_bytes
from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.glimmer import GlimmerConfig

# Id, offset and digest of a passage, and a title of typical length.
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
    """Sizes and encoding time of the memory of a corpus.

    Args:
      config: the model's; its cut and its codec.
      passages: number of passages.
      tokens: mean tokens per passage.
      layout: of its shards.
      device_tflops: sustained by a device, in 10^12 floating-point operations per second.

    Raises:
      ValueError: a number is not positive, or the model has no memory layers.
    """
    if min(passages, tokens, device_tflops) <= 0 or not config.memory_layers:
        raise ValueError(
            "A plan needs a model with memory layers and positive numbers; got memory_layers="
            f"{config.memory_layers}, {passages} passages of {tokens} tokens, {device_tflops} "
            "TFLOP/s. Set NUM_PASSAGES or PASSAGES_DIR, PASSAGE_TOKENS and DEVICE_TFLOPS."
        )
    codec = codecs.get(config.memory_codec)
    specs = codec.array_specs(config.t5.emb_dim)
    token = token_bytes(specs)
    shards = -(-passages // layout.shard_passages)
    chunks = passages * tokens / layout.chunk_tokens * len(specs)
    cost = question_cost(config, passages=1, question=0, passage=1, answer=0)
    arrays = shards * (_INDEX_ARRAYS + len(specs))
    size = passages * (tokens * token + _INDEX_BYTES) + chunks * _CHUNK_BYTES
    # The paper counts a multiply-add as one operation.
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


_TRIES = 3
# Side of the square matrices, on a CPU and elsewhere.
_SIDE = {True: 512, False: 8192}


def matmul_rate(mesh: Mesh, operands: str) -> float:
    """Multiply-adds per second of all devices together, the best of a few products.

    Args:
      mesh: its devices multiply at the same time.
      operands: dtype; results are float32 on a CPU, and of that dtype elsewhere, as in the model.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    side, result = _SIDE[on_cpu], jnp.float32 if on_cpu else jnp.dtype(operands)
    own = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(np.ones((mesh.size, side, side), operands), own)

    @jax.jit
    def multiply(x: jax.Array) -> jax.Array:
        return jnp.einsum("nij,njk->nik", x, x, preferred_element_type=result)

    seconds = []
    for _ in range(_TRIES + 1):
        began = time.monotonic()
        jax.block_until_ready(multiply(x))
        seconds.append(time.monotonic() - began)
    # The first one was compiled.
    return mesh.size * side**3 / min(seconds[1:])
