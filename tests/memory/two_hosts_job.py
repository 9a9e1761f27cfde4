"""One process of two: answers that are sums of memory, from a table on the mesh of both.

`two_hosts_job.py STORE OUT COORDINATOR PROCESS_ID`; each process has two virtual devices.
"""

import json
import os
import pathlib
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax.memory.lookup import DiskLookup, MeshLookup
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.runtime.distributed import join
from glimmer_jax.serving.step import Predict

LENGTH = 12
MESHES = (
    MeshConfig(data=2, model=2),
    MeshConfig(data=1, passages=4),  # all devices share every row
    MeshConfig(data=2, passages=2),
)


class Sums:
    """A model whose answers are lengths, and whose scores are sums of states."""

    def read_batch(self, params, batch):
        states = batch["passage_memory"]["states"].astype(jnp.float32)
        return states, batch["passage_lengths"], {}

    def answer_batch(self, params, encoded, mask, *, length, rng, candidates):
        return mask, {"scores": jnp.sum(encoded, axis=(1, 2, 3))}


def batch(store):
    rows = np.array([[0, 22, -1, 4], [7, 7, 3, 3], [-1, -1, -1, -1], [21, 1, 13, 5]])
    ids = np.where(rows < 0, -1, store.ids[rows])
    return {
        "question_tokens": np.ones((4, 2), np.int32),
        "passage_ids": ids,
        "decoder_input_tokens": np.zeros((4, 3), np.int32),
    }


def answers(store, home, mesh):
    predict = Predict(Sums(), mesh, home)
    (read,) = predict.prefetch([batch(store)])
    tokens, aux = predict({}, read)
    return [tokens.tolist(), aux["scores"].tolist()]


if __name__ == "__main__":
    path, out, coordinator, process = sys.argv[1:]
    join(False, coordinator, 2, int(process), timeout=200)
    store = MemoryStore.open(path)
    found = []
    for config in MESHES:
        mesh = make_mesh(config)
        found.append(answers(store, MeshLookup(store, mesh, LENGTH), mesh))
        found.append(answers(store, DiskLookup(store, LENGTH), mesh))
    pathlib.Path(out, process).write_text(json.dumps([jax.process_count(), found]))
