"""A tiny GTR with random weights, in the files of sentence-transformers."""

import dataclasses
import json

import jax
import numpy as np
import safetensors.numpy

from glimmer_jax import partitioning
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.retrieval.text_encoder import TextEncoder
from glimmer_jax.vocabulary import PYDOCS_MODEL, Vocabulary
from glimmer_jax.weights import huggingface_names as names
from glimmer_jax.weights import t5_names
from tests.models import tiny

T5 = dataclasses.replace(
    tiny.T5,
    vocab_size=Vocabulary("pydocs").vocab_size,
    # These sizes separate the texts of the tests by their random embeddings.
    emb_dim=64,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=2,
    mlp_activations=("relu",),
    scan_layers=False,
)
VECTOR_DIM = 48
MAX_LENGTH = 24


def write(folder, seed=0, words_alone=False):
    """The published layout, float16 as published; returns the folder.

    Args:
      words_alone: layers add nothing, so that texts are alike as far as they share words.
    """
    random = np.random.default_rng(seed)

    def draw(name, shape):
        if words_alone and name.endswith((".o.weight", ".wo.weight")):
            return np.zeros(shape, np.float16)
        if name.endswith("norm.weight"):
            return (1 + 0.1 * random.normal(size=shape)).astype(np.float16)
        scale = 1.0 if "shared" in name or "bias" in name else shape[-1] ** -0.5
        return (scale * random.normal(size=shape)).astype(np.float16)

    tensors = {}
    setting = GlimmerConfig(T5)
    for name, shape in t5_names.shapes(setting).items():
        if name.startswith(("encoder/", "token_embedder/")):
            shape = tuple(reversed(shape)) if names.transposed(name) else shape
            theirs = names.their_name(name, setting)
            tensors[theirs] = draw(theirs, shape)
    linear = {"linear.weight": draw("linear.weight", (VECTOR_DIM, T5.emb_dim))}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    for place, _ in modules:
        (folder / place).mkdir(parents=True, exist_ok=True)
    modules.append(("3_Normalize", "Normalize"))
    save_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": place,
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (place, kind) in enumerate(modules)
        ],
    )
    encoder = {**names.write_config(T5), "architectures": ["T5EncoderModel"]}
    save_json(folder / "config.json", encoder)
    save_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_LENGTH})
    save_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    save_json(
        folder / "2_Dense" / "config.json",
        {
            "in_features": T5.emb_dim,
            "out_features": VECTOR_DIM,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    safetensors.numpy.save_file(linear, folder / "2_Dense" / "model.safetensors")
    (folder / "spiece.model").write_bytes(PYDOCS_MODEL.read_bytes())
    return folder


def encoder(folder, devices=2, rows=2):
    """The encoder of a folder, on the first devices."""
    mesh = partitioning.make_mesh(partitioning.MeshConfig(), jax.devices()[:devices])
    return TextEncoder.open(folder, mesh, rows)


def write_corpus(folder, count=11, word="thing"):
    """Passages of a few words; ids that are not rows; two passages a page."""
    records = [
        {
            "id": 1000 - 7 * i,
            "title": f"page {i // 2}",
            "text": f"{word} number {i * 37} " + "of many " * (i % 3),
            "page": f"p{i // 2}",
            "chunk": i % 2,
        }
        for i in range(count)
    ]
    write_passages(folder, records, lambda text: list(text.encode()), "f", 999, vocab_size=256)
    return Passages.open(folder)


def save_json(path, value):
    path.write_text(json.dumps(value))
