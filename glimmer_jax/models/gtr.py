"""GTR (arXiv 2112.07899): one vector per text, from a T5 encoder.

    tokens -> T5 encoder -> mean over tokens -> linear, no bias -> unit length

One tower encodes questions and passages; their similarity is the dot product. The encoder is
complete: all layers, one position table, the final norm.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes
from glimmer_jax.models.t5 import EncoderStack, T5Config, position_bias
from glimmer_jax.nn.layers import Dense, Embed, RMSNorm


class Encoder(EncoderStack):
    """A complete T5 encoder."""

    def setup(self):
        super().setup()
        self.relpos_bias = position_bias(self.config, bidirectional=True)
        self.encoder_norm = RMSNorm(jnp.dtype(self.config.dtype))

    def encode(self, x: jax.Array, key_mask: jax.Array) -> jax.Array:
        """Embedded tokens `[B, N, D]`, bool mask `[B, N]` -> states `[B, N, D]`."""
        bias = self.relpos_bias(x.shape[1], x.shape[1])
        return self.encoder_norm(self(x, key_mask, bias))


class Gtr(nn.Module):
    """The tower; uses the encoder's fields of `config`."""

    config: T5Config
    vector_dim: int  # E, channels of the vector

    def setup(self):
        t5 = self.config
        self.token_embedder = Embed(t5.vocab_size, t5.emb_dim, jnp.dtype(t5.dtype))
        self.encoder = Encoder(t5, t5.num_encoder_layers)
        # float32 after the encoder: a rounded vector would not have unit length.
        self.projection = Dense(self.vector_dim, (axes.EMBED, axes.KV), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 `[B, N]`, left-aligned, 0 is padding -> float32 `[B, E]` of unit length.

        A row without tokens gives zeros.
        """
        mask = tokens > 0
        states = self.encoder.encode(self.token_embedder(tokens), mask).astype(jnp.float32)
        total = jnp.sum(jnp.where(mask[..., None], states, 0.0), axis=1)
        count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        vector = self.projection(total / count)
        return vector / jnp.maximum(jnp.linalg.norm(vector, axis=1, keepdims=True), 1e-12)
