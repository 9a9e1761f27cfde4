"""Codebooks of a memory codec as parameters of the model that reads the memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes, codecs

# Codebooks that training may move (`training.codebooks`); the others define the centroids' space.
TRAINED = ("centroids", "frequencies")

_INIT = {
    "basis": lambda key, shape, dtype: jnp.eye(shape[0], dtype=dtype),
    "scale": nn.initializers.ones,
    "mean": nn.initializers.zeros,
    "frequencies": lambda key, shape, dtype: jnp.full(shape, 1 / shape[-1], dtype),
}


class Codebooks(nn.Module):
    """The codebooks of codec `codec`; `memory.codebooks` learns them from an encoder's states."""

    codec: str
    emb_dim: int
    trained: bool = False

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """float32 arrays of `Codec.codebook_specs`, without gradient unless trained."""
        codebooks = {}
        for name, shape in codecs.get(self.codec).codebook_specs(self.emb_dim).items():
            init = _INIT.get(name, nn.initializers.normal(1.0))
            names = (axes.CODEBOOK, axes.CODE, axes.CODE_CHANNEL)[: len(shape)]
            if name not in TRAINED:
                names = (axes.CODEBOOK, axes.CODE_CHANNEL)[: len(shape)]
            value = self.param(name, nn.with_logical_partitioning(init, names), shape, jnp.float32)
            is_trained = self.trained and name in TRAINED
            codebooks[name] = value if is_trained else jax.lax.stop_gradient(value)
        return codebooks
