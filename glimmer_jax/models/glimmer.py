"""FiD, LUMEN and GLIMMER: one T5 encoder, cut at M and at M + R.

    layers [0, M)      memory encoder   the passage alone; its output is stored
    layers [M, M+R)    Live-A           [question ; passage], all passages; yields a score
    layers [M+R, L)    Live-B           [question ; passage], the best passages only
    decoder                             attends to all tokens of the kept passages

    FiD      (arXiv 2007.01282)  M = 0, R = 0, all passages kept
    LUMEN    (arXiv 2301.10448)  M > 0, R = 0, all passages kept, frozen memory, own question encoder
    GLIMMER  (arXiv 2306.10231)  M > 0, R > 0, m of K passages kept, memory trained end to end

The memory is the residual stream after layer M, without a norm, so that M = 0 is exactly FiD. The
question is right-aligned in its Q slots and the passage follows immediately. All distances thus equal
those of the unpadded text, and one static position bias serves every batch.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glimmer_jax import axes, codecs
from glimmer_jax.models.codebooks import Codebooks
from glimmer_jax.models.decoder import Cache, Decoder
from glimmer_jax.models.selection import Live, fuse, select
from glimmer_jax.models.t5 import EncoderStack, T5Config, position_bias
from glimmer_jax.nn.layers import Dropout, Embed, RMSNorm
from glimmer_jax.partitioning import FREE, constrain

Batch = dict[str, Any]


def memory_layers(num_layers: int, alpha: float) -> int:
    """M for a live proportion `alpha` of `num_layers`; the live part is rounded to full layers."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha (ALPHA) must be in [0, 1], got {alpha}.")
    return num_layers - round(alpha * num_layers)


def rerank_layers(num_layers: int, alpha: float, beta: float) -> int:
    """R for a reranking proportion `beta` of the live layers; at least one unless beta is 0."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta (BETA) must be in [0, 1], got {beta}.")
    live = num_layers - memory_layers(num_layers, alpha)
    return min(live, max(1, round(beta * live))) if beta else 0


@dataclasses.dataclass(frozen=True)
class GlimmerConfig:
    """The cuts of the encoder, and the trained parts."""

    t5: T5Config
    memory_layers: int = 0  # M, layers computed ahead of time
    rerank_layers: int = 0  # R, live layers before the selection, applied to all passages
    num_kept: int | None = None  # m, passages selected for Live-B; None keeps all
    freeze_memory: bool = False  # memory encoder and its embedding are not trained
    share_question_encoder: bool = True  # the memory encoder encodes questions as well
    share_position_table: bool = (
        False  # between memory and live layers; allows moving the cut later
    )
    separate_reranker: bool = False  # R separate layers for the scores, not reused for reading
    read_chunk: int | None = None  # passages in Live-B at a time when answering; None is all
    memory_codec: str = "bf16"  # of stored memory; training rounds the same way
    train_codebooks: bool = False  # the codec's centroids follow the encoder (`training.codebooks`)

    def __post_init__(self):
        m, r, layers = self.memory_layers, self.rerank_layers, self.t5.num_encoder_layers
        if m < 0 or r < 0 or m + r > layers:
            raise ValueError(
                f"memory_layers={m} and rerank_layers={r} must fit into the encoder's {layers} "
                "layers."
            )
        for name in ("num_kept", "read_chunk"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= axes.MAX_LENGTH:
                raise ValueError(
                    f"{name} must be at least 1 and at most {axes.MAX_LENGTH}, or None for all; got "
                    f"{value}."
                )
        if self.num_kept is not None and r == 0:
            raise ValueError(
                f"num_kept={self.num_kept} needs scores, and rerank_layers is 0. Set rerank_layers, or "
                "retrieve fewer passages."
            )
        if self.separate_reranker and r == 0:
            raise ValueError("separate_reranker needs rerank_layers of at least 1.")
        if m == 0 and (self.freeze_memory or not self.share_question_encoder):
            raise ValueError(
                "memory_layers=0 needs freeze_memory=False and share_question_encoder=True: there is no "
                "memory encoder to freeze or to copy."
            )
        if self.share_position_table and (self.freeze_memory or not self.share_question_encoder):
            raise ValueError(
                "share_position_table must be False with freeze_memory or without "
                "share_question_encoder: it would train a part of the frozen or copied encoder."
            )
        codecs.get(self.memory_codec)
        if self.train_codebooks and not self.has_codebooks:
            raise ValueError(
                f"train_codebooks needs a codec with codebooks, got memory_codec={self.memory_codec!r} "
                f"and memory_layers={m}. Set memory_codec='pq', or train_codebooks=False."
            )

    def with_t5(self, **changes: Any) -> "GlimmerConfig":
        """The same configuration with other fields of `t5`."""
        return dataclasses.replace(self, t5=dataclasses.replace(self.t5, **changes))

    @property
    def has_codebooks(self) -> bool:
        """Whether the memory codec has codebooks."""
        specs = codecs.get(self.memory_codec).codebook_specs(self.t5.emb_dim)
        return bool(self.memory_layers and specs)


class MemoryEncoder(EncoderStack):
    """Layers [0, M), by default with their own position table; no final norm."""

    own_table: bool = True

    def setup(self):
        super().setup()
        if self.own_table:
            self.relpos_bias = position_bias(self.config, bidirectional=True)

    def __call__(
        self, x: jax.Array, key_mask: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        """Embedded tokens `[..., P, D]`, bool mask `[..., P]` -> states `[..., P, D]`."""
        if self.own_table:
            bias = self.relpos_bias(x.shape[-2], x.shape[-2])
        return super().__call__(x, key_mask, bias)


class LiveEncoder(nn.Module):
    """Layers [M, L): Live-A, Live-B, one position table, the encoder's final norm."""

    config: GlimmerConfig

    def setup(self):
        t5, cut = self.config.t5, self.config.memory_layers + self.config.rerank_layers
        self.relpos_bias = position_bias(t5, bidirectional=True)
        self.live_a = EncoderStack(t5, self.config.rerank_layers)
        self.live_b = EncoderStack(t5, t5.num_encoder_layers - cut)
        self.encoder_norm = RMSNorm(jnp.dtype(t5.dtype))
        self.dropout = Dropout(t5.dropout_rate)

    def bias(self, length: int) -> jax.Array:
        """Relative position bias, float32 `[H, N, N]` for `N = length`."""
        return self.relpos_bias(length, length)

    def first(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Live-A over `[..., N, D]`."""
        return self.live_a(x, mask, self.bias(x.shape[-2]))

    def last(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Live-B and the final norm over `[..., N, D]`."""
        return self.dropout(self.encoder_norm(self.live_b(x, mask, self.bias(x.shape[-2]))))


class Reranker(nn.Module):
    """A score from the state of the first token, optionally after `num_layers` separate layers."""

    config: T5Config
    num_layers: int = 0

    def setup(self):
        self.stack = EncoderStack(self.config, self.num_layers)
        # The residual stream is large; without a norm the score would be large as well.
        self.norm = RMSNorm(jnp.float32)
        # The weights are `kernel - 1`, initially zero: all passages tie, which keeps the retriever's
        # order. A parameter of zeros would hardly move, because Adafactor's steps are relative to
        # the size of a parameter.
        self.kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,)),
            (self.config.emb_dim,),
            jnp.float32,
        )

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """`[B, K, N, D]`, `[B, K, N]` -> float32 `[B, K]`."""
        x = self.stack(x, mask, bias)
        index = first_token(mask)[..., None, None]
        return self.score(jnp.take_along_axis(x, index, axis=-2)[..., 0, :])

    def score(self, x: jax.Array) -> jax.Array:
        """States of the first tokens `[B, K, D]` -> float32 `[B, K]`."""
        return self.norm(x) @ (self.kernel - 1.0)


def first_token(mask: jax.Array) -> jax.Array:
    """bool `[..., N]` -> int32 `[...]`, the first True position of each sequence; 0 without any."""
    return jnp.argmax(mask, axis=-1)


class Glimmer(nn.Module):
    """FiD, LUMEN and GLIMMER. Methods are in the order of the paper: memory, rerank, read, answer."""

    config: GlimmerConfig

    def setup(self):
        config, t5 = self.config, self.config.t5
        self.token_embedder = self._embedder()
        # No dropout in a frozen encoder: training uses the same states as the store.
        memory_t5 = dataclasses.replace(t5, dropout_rate=0.0) if config.freeze_memory else t5
        if config.memory_layers:
            own_table = not config.share_position_table
            self.memory_encoder = MemoryEncoder(memory_t5, config.memory_layers, own_table)
        if config.freeze_memory:
            # T5 shares its embedding with the decoder, whose training would make the memory stale.
            self.memory_embedder = self._embedder()
        if config.has_codebooks:
            self.memory_codebooks = Codebooks(
                config.memory_codec, t5.emb_dim, config.train_codebooks
            )
        if not config.share_question_encoder:
            self.question_encoder = MemoryEncoder(t5, config.memory_layers)
        self.live_encoder = LiveEncoder(config)
        if config.rerank_layers:
            layers = config.rerank_layers if config.separate_reranker else 0
            self.reranker = Reranker(t5, layers)
        self.decoder = Decoder(t5)
        self.dropout = Dropout(t5.dropout_rate)

    def _embedder(self) -> Embed:
        t5 = self.config.t5
        return Embed(t5.vocab_size, t5.emb_dim, jnp.dtype(t5.dtype))

    def memory_states(self, tokens: jax.Array) -> jax.Array:
        """The memory encoder on tokens `[..., X]` -> `[..., X, D]`."""
        if not self.config.memory_layers:
            return self.dropout(self.token_embedder(tokens))
        bias = (
            self.live_encoder.bias(tokens.shape[-1]) if self.config.share_position_table else None
        )
        if not self.config.freeze_memory:
            return self.memory_encoder(self.dropout(self.token_embedder(tokens)), tokens > 0, bias)
        states = self.memory_encoder(self.memory_embedder(tokens), tokens > 0)
        return jax.lax.stop_gradient(states)

    def encode_question(self, question_tokens: jax.Array) -> jax.Array:
        """int32 `[B, Q]`, right-aligned -> states `[B, Q, D]` at the cut."""
        if self.config.share_question_encoder:
            return self.memory_states(question_tokens)
        x = self.dropout(self.token_embedder(question_tokens))
        return self.question_encoder(x, question_tokens > 0)

    def encode_memory(self, passage_tokens: jax.Array) -> dict[str, jax.Array]:
        """int32 `[..., P]` -> stored arrays of the codec, `[..., P, *trailing]`."""
        codec = codecs.get(self.config.memory_codec)
        return codec.encode(self.memory_states(passage_tokens), self._codebooks())

    def _codebooks(self) -> dict[str, jax.Array] | None:
        return self.memory_codebooks() if self.config.has_codebooks else None

    def passage_states(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """States of a batch's passages, computed from tokens or decoded from stored memory.

        Returns:
          States `[B, K, P, D]` and bool mask `[B, K, P]`.
        """
        codec = codecs.get(self.config.memory_codec)
        if "passage_memory" in batch:
            memory = {
                name: constrain(x, (axes.BATCH, axes.PASSAGES, *(FREE,) * (x.ndim - 2)))
                for name, x in batch["passage_memory"].items()
            }
            dtype = jnp.dtype(self.config.t5.dtype)
            states = codec.decode(memory, dtype, self._codebooks())
            positions = jnp.arange(states.shape[2])[None, None]
            return states, positions < batch["passage_lengths"][..., None]
        tokens = constrain(batch["passage_tokens"], (axes.BATCH, axes.PASSAGES, axes.LENGTH))
        states = self.memory_states(tokens)
        if self.config.memory_layers:
            counted = tokens > 0 if self.config.train_codebooks else None
            states = codecs.straight_through(codec, states, self._codebooks(), counted)
        return states, tokens > 0

    def rerank(self, batch: Batch) -> Live:
        """Runs Live-A on question and memory, and scores every passage.

        Args:
          batch: `question_tokens` and either `passage_tokens`, or `passage_memory` with
            `passage_lengths`; see `models.model`.
        """
        states, mask, exists_BK = self._sequences(batch)
        if not self.config.rerank_layers:
            scores = jnp.zeros(exists_BK.shape, jnp.float32)
        else:
            if not self.config.separate_reranker:
                states = self.live_encoder.first(states, mask)
            scores = self.reranker(states, mask, self.live_encoder.bias(states.shape[2]))
        return Live(states, mask, jnp.where(exists_BK, scores, -jnp.inf))

    def choose(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """`rerank` and `select` without the states of dropped passages.

        For dropped passages, the last layer before the score is computed only at the scored token.
        This needs unrolled layers; scanned layers, or keeping all passages, save nothing.

        Returns:
          States `[B, m, N, D]`, mask `[B, m, N]`, int32 indices `[B, m]` into the K passages, and
          float32 scores `[B, K]`, -inf for absent passages.
        """
        config = self.config
        if config.t5.scan_layers or config.num_kept is None:
            live = self.rerank(batch)
            return *select(live, config.num_kept), live.scores
        states, mask, exists_BK = self._sequences(batch)
        bias = self.live_encoder.bias(states.shape[2])
        separate = config.separate_reranker
        stack = self.reranker.stack if separate else self.live_encoder.live_a
        below = stack.below_last(states, mask, bias)
        scores = self.reranker.score(stack.last_at(below, first_token(mask), mask, bias))
        scores = jnp.where(exists_BK, scores, -jnp.inf)
        live = Live(states if separate else below, mask, scores)
        states, mask, kept = select(live, config.num_kept)
        if not separate:
            states = stack.last(states, mask, bias)
        return states, mask, kept, scores

    def _sequences(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """States `[B, K, N, D]` of question and memory, their mask, and which passages exist."""
        question_BQ = batch["question_tokens"]
        question_BQD = self.encode_question(question_BQ)
        passages_BKPD, passage_mask_BKP = self.passage_states(batch)
        num_passages = passages_BKPD.shape[1]

        exists_BK = jnp.any(passage_mask_BKP, axis=-1)
        # A question without passages reads one empty passage.
        none_B1 = ~jnp.any(exists_BK, axis=-1, keepdims=True)
        exists_BK = exists_BK | (none_B1 & (jnp.arange(num_passages) == 0)[None])

        def each_passage(x):
            return jnp.broadcast_to(x[:, None], (x.shape[0], num_passages, *x.shape[1:]))

        states = jnp.concatenate([each_passage(question_BQD), passages_BKPD], axis=2)
        states = constrain(states, (axes.BATCH, axes.PASSAGES, axes.LENGTH, axes.ACT_EMBED))
        mask = jnp.concatenate([each_passage(question_BQ > 0), passage_mask_BKP], axis=2)
        return states, mask & exists_BK[..., None], exists_BK

    def read(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        """The remaining live layers on kept passages, `[B, M, N, D]` -> the same shape."""
        if self.config.separate_reranker:
            states = self.live_encoder.first(states, mask)
        return self.live_encoder.last(states, mask)

    def decode(self, encoded: jax.Array, mask: jax.Array, decoder_input_tokens: jax.Array):
        """Logits `[..., T, V]` of targets `[..., T]` over encoder states `[..., S, D]`."""
        x = self.dropout(self.token_embedder(decoder_input_tokens))
        return self.decoder(x, encoded, mask, self._output_table())

    def _output_table(self) -> jax.Array | None:
        return self.token_embedder.table() if self.config.t5.tie_output else None

    def start_decoding(self, encoded: jax.Array) -> Any:
        """Cross-attention keys and values of all decoder layers, once per question."""
        return self.decoder.cross_keys_values(encoded)

    def empty_cache(self, batch: int, beams: int, length: int) -> Cache:
        """The empty decoder cache for `batch` rows, `beams` beams and `length` tokens."""
        return self.decoder.empty_cache(batch, beams, length)

    def decode_step(self, tokens, index, cache, cross_keys_values, mask):
        """One token `[B, W]` of every beam -> logits `[B, W, V]` and the new cache."""
        x = self.token_embedder(tokens)
        return self.decoder.step(x, index, cache, cross_keys_values, mask, self._output_table())

    def __call__(self, batch: Batch) -> tuple[jax.Array, Live, jax.Array]:
        """Logits float32 `[B, T, V]`, the live states of all passages, kept indices `[B, m]`."""
        live = self.rerank(batch)
        states, mask, kept = select(live, self.config.num_kept)
        encoded, mask = fuse(self.read(states, mask), mask)
        return self.decode(encoded, mask, batch["decoder_input_tokens"]), live, kept
