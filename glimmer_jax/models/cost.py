"""What a question costs, counted the paper's way: GLIMMER (arXiv 2306.10231), section on cost.

One unit is a multiply-add of a projection; attention's score products and the softmax over the
vocabulary are left out, as the papers do. With H*C = D and F = 8D/3 an encoder layer is 12 D^2 a
token, and cross-attention keys and values are 2 D^2 a token and decoder layer.
"""

import dataclasses

from glimmer_jax.models.glimmer import GlimmerConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-adds of one question, by part."""

    question: int  # the question alone through the memory encoder
    rerank: int  # Live-A (or the separate reranker), every passage
    read: int  # the remaining live layers, kept passages
    cross: int  # the decoder's keys and values over kept passages
    answer: int  # the decoder's own layers over the answer
    precompute: int  # one passage through the memory encoder, ahead of time; not in `total`

    @property
    def total(self) -> int:
        return self.question + self.rerank + self.read + self.cross + self.answer

    @property
    def tflop(self) -> float:
        """10^12 multiply-adds, which is what the papers call a TFLOP."""
        return self.total / 1e12


def question_cost(
    config: GlimmerConfig, *, passages: int, question: int, passage: int, answer: int
) -> Cost:
    """The cost of one question with full slots.

    Args:
      config: the setting; FiD is the one with `memory_layers` 0, whose passages are encoded now.
      passages: K, retrieved.
      question: Q, tokens.
      passage: P, tokens.
      answer: T, tokens.
    """
    t5 = config.t5
    attention = t5.emb_dim * t5.num_heads * t5.head_dim
    feed_forward = (len(t5.mlp_activations) + 1) * t5.emb_dim * t5.mlp_dim
    encoder_layer = 4 * attention + feed_forward
    # Queries and outputs have all heads, keys and values perhaps fewer (FiDO).
    sizes = t5.decoder_sizes
    queries = 2 * t5.emb_dim * sizes.num_heads * sizes.head_dim
    keys = 2 * t5.emb_dim * sizes.num_kv_heads * sizes.head_dim
    decoder_feed_forward = (len(t5.mlp_activations) + 1) * t5.emb_dim * sizes.mlp_dim
    attending = t5.num_decoder_layers // t5.cross_attention_period
    kept = passages if config.num_kept is None else min(config.num_kept, passages)
    live = t5.num_encoder_layers - config.memory_layers
    reused = 0 if config.separate_reranker else config.rerank_layers
    tokens = question + passage
    return Cost(
        question=question * config.memory_layers * encoder_layer,
        rerank=passages * tokens * config.rerank_layers * encoder_layer,
        read=kept * tokens * (live - reused) * encoder_layer,
        cross=kept * tokens * attending * keys,
        # Queries and output of cross-attention are computed for each answer token, too.
        answer=answer
        * (t5.num_decoder_layers * (queries + keys + decoder_feed_forward) + attending * queries),
        precompute=passage * config.memory_layers * encoder_layer,
    )
