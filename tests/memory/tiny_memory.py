"""A corpus and an encoder of a few numbers, and a build of them; also run as a script.

As a script, `python tiny_memory.py FOLDER die_at`: builds FOLDER, and kills itself with SIGKILL
(or asks itself to stop with SIGTERM) at a named point.
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax import codecs
from glimmer_jax.memory import build
from glimmer_jax.preemption import Preempted

MAX_LENGTH = 12
EMB_DIM = 8


class TinyPassages:
    """Random tokens; ids that are not rows."""

    def __init__(self, count=23, longest=MAX_LENGTH, seed=0):
        rng = np.random.default_rng(seed)
        self.ids = (rng.permutation(1000)[:count] * 10**10).astype(np.int64)
        sizes = rng.integers(1, longest + 1, count)
        self.all_tokens = [rng.integers(2, 90, size).astype(np.int32) for size in sizes]

    def __len__(self):
        return len(self.ids)

    def lengths(self, rows):
        return np.array([len(self.all_tokens[row]) for row in rows], np.int32)

    def tokens(self, rows, length):
        out = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            cut = self.all_tokens[row][:length]
            out[i, : len(cut)] = cut
        return out

    def text(self, row):
        return {"title": f"Title\n{row} \ud800 \u2028", "text": ""}


def encode_states(tokens):
    """Mixes each token with its row, as attention would; float32 `[n, P, D]`."""
    tokens = jnp.asarray(tokens)
    x = jnp.sin(tokens[..., None] * (1.0 + jnp.arange(EMB_DIM, dtype=jnp.float32))[None, None])
    real = (tokens > 0)[..., None]
    return x - jnp.sum(x * real, axis=1, keepdims=True)


@jax.jit
def encode(tokens):
    return codecs.get("bf16").encode(encode_states(tokens))


def build_tiny(path, passages=None, **kwargs):
    settings = dict(
        encode=encode,
        passages=passages if passages is not None else TinyPassages(),
        codec="bf16",
        emb_dim=EMB_DIM,
        encoder_fingerprint="sha256:e1",
        vocabulary_fingerprint="sha256:v1",
        max_length=MAX_LENGTH,
        batch_size=4,
        buckets=(4, 8, MAX_LENGTH),
        shard_passages=6,
        chunk_tokens=4,
        reference=encode_states,
    )
    settings.update(kwargs)
    return build.build_memory(path=path, **settings)


def _main(path, die_at):
    calls = 0

    def dying_encode(tokens):
        nonlocal calls
        calls += 1
        # The third shard of four, after the sample for the error and two shards.
        if die_at == "encode" and calls == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        if die_at == "sigterm" and calls == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(tokens)

    write = build._write

    def dying_write(kvstore, name, content, job):
        if die_at == "between_arrays_and_record" and name == "000001":
            shard_write = build.shard.write_arrays

            def then_die(*args, **kwargs):
                shard_write(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            build.shard.write_arrays = then_die
        return write(kvstore, name, content, job)

    build._write = dying_write
    if die_at == "before_manifest":
        build._manifest = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    try:
        build_tiny(path, encode=dying_encode)
    except Preempted:
        sys.exit(42)


if __name__ == "__main__":
    _main(*sys.argv[1:])
