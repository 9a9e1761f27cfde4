"""The legend: one letter per dimension, one name per axis.

Local arrays carry their shape as a suffix (`memory_BKPD`); docstrings spell the same letters as
`[B, K, P, D]`:

    B  batch                       T  answer tokens
    K  retrieved passages          D  model width
    M  kept passages               H  attention heads
    P  passage tokens              C  channels of a head
    Q  question tokens             F  width of the gated feed-forward
    N  Q + P, one live sequence    V  vocabulary
    L  layers of a stack           W  beams
    G  key and value heads         S  tokens of all kept passages, M x N

The names below label the dimensions of parameters and activations. `partitioning.AXIS_RULES` is the
only place where a name meets the mesh. Parameter names are those of T5X, so that its partitioners
and checkpoints understand our trees.

TASK_FEATURE_LENGTHS: how many tokens questions, answers and passages get.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Parameters (T5X's names).
VOCAB = "vocab"
EMBED = "embed"
JOINED_KV = "joined_kv"
KV = "kv"  # keys and values of fewer heads than queries have
HEADS = "heads"
MLP = "mlp"
RELPOS_BUCKETS = "relpos_buckets"
LAYERS = "layers"
# Dimensions of what a memory codec has learnt; a name may not come twice in one array.
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

# The memory table: rows of the store, spread over every device.
MEMORY_ROWS = "memory_rows"


class Lengths(NamedTuple):
    """Static sizes of a batch; letters as in `glimmer_jax.axes`."""

    question: int  # Q, tokens
    target: int  # T, tokens, end token included
    passages: int  # K, passages of a question
    passage: int  # P, tokens, end token included


def check_lengths(lengths: Mapping[str, Any]) -> Lengths:
    """The sizes in `{"inputs": Q, "targets": T, "passages": (K, P)}`.

    Raises:
      ValueError: another form.
    """
    wanted = '{"inputs": Q, "targets": T, "passages": (K, P)}, whole numbers of at least 1'
    try:
        count, passage = lengths["passages"]
        found = Lengths(lengths["inputs"], lengths["targets"], count, passage)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"TASK_FEATURE_LENGTHS must be {wanted}; got {lengths!r}.") from None
    if not all(isinstance(value, int) and value >= 1 for value in found):
        raise ValueError(f"TASK_FEATURE_LENGTHS must be {wanted}; got {lengths!r}.")
    return found
