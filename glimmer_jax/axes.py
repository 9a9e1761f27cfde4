"""One letter per dimension, one name per axis.

Local arrays carry their shape as a suffix (`memory_BKPD`); docstrings use the same letters:
`[B, K, P, D]`.

    B  batch                       T  answer tokens
    K  retrieved passages          D  model width
    M  kept passages               H  attention heads
    P  passage tokens              C  channels of a head
    Q  question tokens             F  width of the gated feed-forward
    N  Q + P, one live sequence    V  vocabulary
    L  layers of a stack           W  beams
    G  key and value heads         S  tokens of all kept passages, M x N

The names below label the dimensions of parameters and activations. Only `partitioning.AXIS_RULES`
maps them to the mesh. Parameter names are those of T5X, so that its partitioners and checkpoints
accept our trees. `Lengths` holds the sizes of the dimensions that a task fixes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Parameters (T5X's names).
VOCAB = "vocab"
EMBED = "embed"
JOINED_KV = "joined_kv"
KV = "kv"  # of keys and values with fewer heads than queries
HEADS = "heads"
MLP = "mlp"
RELPOS_BUCKETS = "relpos_buckets"
LAYERS = "layers"
# Codebooks of a memory codec. One array must not use a name twice.
CODEBOOK = "codebook"
CODE = "code"
CODE_CHANNEL = "code_channel"

# Activations.
BATCH = "batch"
PASSAGES = "passages"
LENGTH = "length"
ACT_EMBED = "activation_embed"
ACT_HEADS = "activation_heads"
ACT_KV = "activation_kv"
ACT_MLP = "activation_mlp"
ACT_VOCAB = "activation_vocab"

# The memory table: rows of the store, sharded over all devices.
MEMORY_ROWS = "memory_rows"


MAX_LENGTH = 2**20  # of anything that a batch has; no model or memory takes more


class Lengths(NamedTuple):
    """Static sizes of a batch: TASK_FEATURE_LENGTHS."""

    question: int  # Q, tokens
    target: int  # T, tokens, end token included
    passages: int  # K, passages per question
    passage: int  # P, tokens, end token included

    def as_features(self) -> dict[str, Any]:
        """`{"inputs": Q, "targets": T, "passages": (K, P)}`."""
        passages = (self.passages, self.passage)
        return {"inputs": self.question, "targets": self.target, "passages": passages}


def check_lengths(lengths: Mapping[str, Any]) -> Lengths:
    """`{"inputs": Q, "targets": T, "passages": (K, P)}` as `Lengths`.

    Raises:
      ValueError: `lengths` has another form, or a size is not a positive integer.
    """
    expected = (
        '{"inputs": Q, "targets": T, "passages": (K, P)} with positive integers of at most '
        f"{MAX_LENGTH}"
    )
    try:
        passages, passage = lengths["passages"]
        sizes = Lengths(lengths["inputs"], lengths["targets"], passages, passage)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"TASK_FEATURE_LENGTHS must be {expected}; got {lengths!r}.") from None
    if not all(type(size) is int and 1 <= size <= MAX_LENGTH for size in sizes):
        raise ValueError(f"TASK_FEATURE_LENGTHS must be {expected}; got {lengths!r}.")
    return sizes
