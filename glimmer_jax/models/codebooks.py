"""What a memory codec has learnt, as parameters: it travels with the model that reads the memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes, codecs

# Parameters of a codec that may be fine-tuned; the others only say where the centroids lie.
TRAINED = ("centroids",)

_START = {
    "basis": lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype),
    "scale": nn.initializers.ones,
    "mean": nn.initializers.zeros,
}


class Codebooks(nn.Module):
    """The codebooks of codec `codec`. Fresh ones are of no use: see `memory.codebooks`."""

    codec: str
    emb_dim: int
    trained: bool = False

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """float32 arrays of `Codec.codebook_specs`; no gradient goes through what is not trained."""
        found = {}
        for name, shape in codecs.get(self.codec).codebook_specs(self.emb_dim).items():
            start = _START.get(name, nn.initializers.normal(1.0))
            names = (axes.CODEBOOK, axes.CODE, axes.CODE_CHANNEL)[: len(shape)]
            value = self.param(name, nn.with_logical_partitioning(start, names), shape, jnp.float32)
            is_trained = self.trained and name in TRAINED
            found[name] = value if is_trained else jax.lax.stop_gradient(value)
        return found
