"""Quality, bytes and time of the memory codecs on the built-in tasks.

    python -m benchmarks.codec_quality --json OUT.json [--data DIR] [--num_examples N]
                                       [--checkpoint CODEC=PATH ...]

Evaluates the shipped `pydocs_glimmer`, or for a codec the checkpoint fine-tuned with it, with memory
rounded at the cut as a store would (`codecs.straight_through`, bit-equal). Checkpoints without
codebooks use codebooks learned from the corpus. Intervals are paired with bf16 and resample pages.
`--data` is a folder of the built-in corpus in the quickstart's layout (passages/ and retrieved/); it
is created if missing.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peaks import best_seconds
from benchmarks.questions import LENGTHS, Questions, compare, interval, write_data
from glimmer_jax import codecs
from glimmer_jax.codecs import ProductQuantisation
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import codebooks, encoding
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.shipped import CHECKPOINTS
from glimmer_jax.vocabulary import Vocabulary
from glimmer_jax.weights import parameters
from glimmer_jax.weights.load import load

BASELINE = "bf16"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--data", type=Path, default=Path("data/pydocs"), metavar="DIR")
    parser.add_argument("--num_examples", type=int, default=100, help="test questions of each task")
    parser.add_argument("--sample_tokens", type=int, default=65536, help="for learning codebooks")
    parser.add_argument("--codecs", default="bf16,int8,pq", metavar="NAME,NAME")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="CODEC=PATH")
    args = parser.parse_args(argv)
    names = args.codecs.split(",")
    if names[0] != BASELINE:
        parser.error(f"--codecs must begin with {BASELINE}, the baseline; got {args.codecs}.")
    checkpoints = dict(pair.split("=", 1) for pair in args.checkpoint)
    write_data(args.data)
    passages = Passages.open(args.data / "passages")
    questions = Questions(args.data, args.num_examples)
    rows, baseline = [], None
    for name in names:
        path = checkpoints.get(name, CHECKPOINTS / "pydocs_glimmer.safetensors")
        model, params, states = read_model(path, name, passages, args.sample_tokens)
        results = questions.ask(model, params, passages)
        baseline = baseline or results
        rows.append(
            {**cost(model, params, states), **compare(results, baseline), "checkpoint": str(path)}
        )
        print(json.dumps(rows[-1]), flush=True)
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def read_model(
    path: Any, codec_name: str, passages: Passages, sample_tokens: int
) -> tuple[GlimmerModel, Any, np.ndarray]:
    """The checkpoint's model with this codec, its parameters, and states of 16,384 tokens."""
    vocabulary = Vocabulary("pydocs")
    loaded = load(path)
    own = loaded.answering_config()

    def placed(model: GlimmerModel) -> Any:
        fitted = parameters.fit(loaded, path, model, vocabulary.fingerprint)
        return parameters.place(fitted, model, mesh)

    plain = GlimmerModel(dataclasses.replace(own, memory_codec="f32", train_codebooks=False))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = placed(plain)
    states = codebooks.sample_states(
        encoding.bind_states(plain.memory_states, params, mesh),
        passages,
        tokens=sample_tokens + 16384,
        rows=32,
        buckets=encoding.default_buckets(LENGTHS["passages"][1]),
        devices=1,
    )
    model = GlimmerModel(dataclasses.replace(own, memory_codec=codec_name))
    codec = codecs.get(codec_name)
    if own.has_codebooks and own.memory_codec == codec_name:
        params = placed(model)
    elif isinstance(codec, ProductQuantisation):
        books = codebooks.learn(codec, states[:-16384], mesh)
        params = {**params, "memory_codebooks": books}
    return model, params, states[-16384:]


def cost(model: GlimmerModel, params: Any, states_ND: np.ndarray) -> dict[str, Any]:
    """Bytes per token, tokens per second of encoding and decoding, and the error of the states."""
    codec, books = codecs.get(model.config.memory_codec), params.get("memory_codebooks")
    encode = jax.jit(lambda x, books: codec.encode(x, books))
    decode = jax.jit(lambda arrays, books: codec.decode(arrays, jnp.float32, books))
    states = jnp.asarray(states_ND)
    arrays = encode(states, books)
    specs = codec.array_specs(states.shape[-1]).values()
    return {
        "codec": codec.name,
        "bytes_per_token": sum(int(np.prod(shape)) * kind.itemsize for shape, kind in specs),
        "encoded_tokens_per_s": len(states)
        / best_seconds(lambda: jax.block_until_ready(encode(states, books))),
        "decoded_tokens_per_s": len(states)
        / best_seconds(lambda: jax.block_until_ready(decode(arrays, books))),
        "relative_rms": codebooks.relative_error(codec, books, states_ND),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        f"n = {rows[0]['exact_match']['n']} questions",
        "| codec | bytes per token | encoded, tokens/s | decoded | relative error | exact match | "
        "vs. bf16 | nats per token | vs. bf16 |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        lines.append(
            f"| {row['codec']} | {row['bytes_per_token']} | {row['encoded_tokens_per_s']:,.0f} | "
            f"{row['decoded_tokens_per_s']:,.0f} | {row['relative_rms']:.4f} | "
            f"{interval(row['exact_match'])} | {interval(row['nats_per_token'])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
