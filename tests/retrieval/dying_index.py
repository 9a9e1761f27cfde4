"""`python dying_index.py ENCODER PASSAGES INDEX`: kills itself while it writes the third shard."""

import os
import signal
import sys

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.retrieval.build_index import build_index
from glimmer_jax.storage import folder
from tests.retrieval import tiny_gtr

write_file = folder.write_file


def dying_write(kvstore, key, data):
    if key == "shard.json" and kvstore.path.endswith("000002/"):
        os.kill(os.getpid(), signal.SIGKILL)
    write_file(kvstore, key, data)


if __name__ == "__main__":
    encoder_dir, passages_dir, index_dir = sys.argv[1:]
    folder.write_file = dying_write
    encoder = tiny_gtr.encoder(encoder_dir, devices=1)
    build_index(index_dir, Passages.open(passages_dir), encoder, shard_passages=3)
