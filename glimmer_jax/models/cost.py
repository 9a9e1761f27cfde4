"""Cost of a question, counted as in GLIMMER (arXiv 2306.10231), section on cost.

The unit is a multiply-add of a projection. Attention logits, weighted sums and the output layer are
not counted, as in the papers. With H*C = D and F = 8D/3 an encoder layer takes 12 D^2 per token, and
cross-attention keys and values take 2 D^2 per token and decoder layer.
"""

import dataclasses

from glimmer_jax.models.glimmer import GlimmerConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-adds of one question, by part."""

    question: int  # memory encoder, the question
    rerank: int  # Live-A or the separate reranker, all passages
    read: int  # remaining live layers, kept passages
    cross: int  # cross-attention keys and values, kept passages
    answer: int  # decoder layers, the answer
    precompute: int  # memory encoder, one passage, ahead of time; not part of `total`

    @property
    def total(self) -> int:
        """Multiply-adds of one question, without precomputation."""
        return self.question + self.rerank + self.read + self.cross + self.answer

    @property
    def tflop(self) -> float:
        """10^12 multiply-adds, the papers' TFLOP."""
        return self.total / 1e12


def question_cost(
    config: GlimmerConfig, *, passages: int, question: int, passage: int, answer: int
) -> Cost:
    """The cost of one question without padding.

    Args:
      config: the model; FiD has `memory_layers` 0 and encodes passages with the question.
      passages: K, retrieved.
      question: Q, tokens.
      passage: P, tokens.
      answer: T, tokens.
    """
    t5 = config.t5
    attention = t5.emb_dim * t5.num_heads * t5.head_dim
    feed_forward = (len(t5.mlp_activations) + 1) * t5.emb_dim * t5.mlp_dim
    encoder_layer = 4 * attention + feed_forward
    # Queries and outputs have H heads, keys and values G (FiDO).
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
        # Each answer token also takes the queries and outputs of cross-attention.
        answer=answer
        * (t5.num_decoder_layers * (queries + keys + decoder_feed_forward) + attending * queries),
        precompute=passage * config.memory_layers * encoder_layer,
    )
