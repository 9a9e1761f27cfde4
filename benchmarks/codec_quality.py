"""What storing memory costs in quality, bytes and time, codec by codec, on the built-in tasks.

    python -m benchmarks.codec_quality --json OUT.json [--data DIR] [--num_examples N]
                                       [--checkpoint CODEC=PATH ...]

Reads the shipped `pydocs_glimmer`, or for a codec the checkpoint that was fine-tuned with it, and rounds
memory at the cut as a store would (`codecs.straight_through`: the same states, bit for bit). A checkpoint
without codebooks gets some, learnt from the corpus. Intervals are paired with bf16, questions of one page
resampled together. `--data` is a folder of the built-in corpus as the quickstart writes it (passages/ and
retrieved/); it is written where it is not there.
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
from glimmer_jax import codecs
from glimmer_jax.data.vocabulary import Vocabulary
from glimmer_jax.memory import batches, codebooks, encoder
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.passages import Passages
from glimmer_jax.product_quantisation import ProductQuantisation
from glimmer_jax.shipped import CHECKPOINTS
from glimmer_jax.weights import parameters
from glimmer_jax.weights.load import load
from launch.command import glimmer

TASKS = ("which_function", "slot_filling", "fact_verification")
LENGTHS: dict[str, Any] = {"inputs": 36, "targets": 32, "passages": (10, 80)}
BASELINE = "bf16"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--data", type=Path, default=Path("data/pydocs"), metavar="DIR")
    parser.add_argument("--num_examples", type=int, default=100, help="test questions of each task")
    parser.add_argument(
        "--sample_tokens", type=int, default=65536, help="that codebooks are learnt from"
    )
    parser.add_argument("--codecs", default="bf16,int8,pq", metavar="NAME,NAME")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="CODEC=PATH")
    args = parser.parse_args(argv)
    names = args.codecs.split(",")
    if names[0] != BASELINE:
        parser.error(f"--codecs begins with {BASELINE}, which the others are compared with")
    given = dict(one.split("=", 1) for one in args.checkpoint)
    write_data(args.data)
    passages = Passages.open(args.data / "passages")
    questions = Questions(args.data, args.num_examples)
    rows, baseline = [], None
    for name in names:
        path = given.get(name, CHECKPOINTS / "pydocs_glimmer.safetensors")
        model, params, states = read_model(path, name, passages, args.sample_tokens)
        found = questions.ask(model, params, passages)
        baseline = baseline or found
        rows.append(
            {**cost(model, params, states), **compare(found, baseline), "checkpoint": str(path)}
        )
        print(json.dumps(rows[-1]), flush=True)
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def write_data(data: Path) -> None:
    """The built-in corpus and its questions with passages, where they are not there."""
    if not (data / "passages").exists():
        corpus = {"CORPUS_DIR": data / "corpus", "PASSAGES_DIR": data / "passages"}
        glimmer("passages", "pydocs_passages", **corpus)
    if not (data / "retrieved").exists():
        files = {"QUESTIONS": f"{data}/corpus/questions/*.jsonl", "DATA_DIR": data / "retrieved"}
        glimmer("retrieve", "pydocs_retrieve", PASSAGES_DIR=data / "passages", **files)


def read_model(
    path: Any, codec_name: str, passages: Passages, sample_tokens: int
) -> tuple[GlimmerModel, Any, np.ndarray]:
    """The checkpoint's model with this codec, its parameters, and states of some 16,384 tokens."""
    vocabulary = Vocabulary()
    saved = load(path).config
    assert saved is not None
    own = dataclasses.replace(saved, t5=dataclasses.replace(saved.t5, dropout_rate=0.0))
    plain = GlimmerModel(dataclasses.replace(own, memory_codec="f32", train_codebooks=False))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = parameters.place(parameters.load(path, plain, vocabulary.fingerprint), plain, mesh)
    states = codebooks.sample_states(
        encoder.bind_states(plain.memory_states, params, mesh),
        passages,
        tokens=sample_tokens + 16384,
        rows=32,
        buckets=batches.default_buckets(LENGTHS["passages"][1]),
        devices=1,
    )
    model = GlimmerModel(dataclasses.replace(own, memory_codec=codec_name))
    codec = codecs.get(codec_name)
    if saved.has_codebooks and saved.memory_codec == codec_name:
        params = parameters.place(parameters.load(path, model, vocabulary.fingerprint), model, mesh)
    elif isinstance(codec, ProductQuantisation):
        books = codebooks.learn(codec, states[:-16384], mesh)
        params = {**params, "memory_codebooks": books}
    return model, params, states[-16384:]


def cost(model: GlimmerModel, params: Any, states_ND: np.ndarray) -> dict[str, Any]:
    """Bytes a token, tokens a second of encoding and decoding, and the error of the states."""
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


class Questions:
    """Held-out questions of the built-in tasks, and how a model does on each."""

    def __init__(self, data: Path, num_examples: int):
        from glimmer_jax.data import pipeline, retrieved

        retrieved.use(str(data / "retrieved"), vocabulary=Vocabulary())
        pipeline.import_tasks("tasks.pydocs")
        self._data, self._count = data, num_examples

    def ask(self, model: GlimmerModel, params: Any, passages: Passages) -> list[dict[str, Any]]:
        """`{"task", "page", "match", "log_likelihood", "tokens"}` of each question, in order."""
        from glimmer_jax.data import scoring
        from glimmer_jax.data.evaluation import Evaluation
        from glimmer_jax.json_lines import read_json_lines

        scored: list[tuple[float, float]] = []
        answer, score = jax.jit(model.predict_batch_with_aux), jax.jit(model.score_batch)

        def predict(batch: dict[str, Any]) -> Any:
            given = {name: x for name, x in batch.items() if name != "passage_ids"}
            tokens, aux = answer(params, given)
            counts = batch["decoder_loss_weights"].sum(-1)
            # In the order of the examples; the rows that fill up the last batch come after them.
            scored.extend(zip(np.asarray(score(params, given)), counts, strict=True))
            if "gold_passages" in batch:
                aux = {**aux, "gold_passages": batch["gold_passages"]}
            return tokens, aux

        found = []
        for task in TASKS:
            scored.clear()
            dev = Evaluation(
                f"pydocs_{task}", "test", LENGTHS, 16, passages=passages, num_examples=self._count
            )
            dev.run(predict)
            (records,) = dev.predictions().values()
            gold = {
                str(one["id"]): one
                for _, one in read_json_lines(self._data / "retrieved" / f"{task}-test.jsonl")
            }
            for record, (value, count) in zip(records, scored[: len(records)], strict=True):
                one = gold[record["id"]]
                answers = [output["answer"] for output in one["output"] if "answer" in output]
                pages = [p for output in one["output"] for p in output.get("provenance", [])]
                found.append(
                    {
                        "task": task,
                        "page": str(pages[0]["wikipedia_id"]) if pages else record["id"],
                        "match": scoring.match_of(answers, record["prediction"]),
                        "log_likelihood": float(value),
                        "tokens": float(count),
                    }
                )
        return found


def compare(found: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match and nats a token that are lost against the baseline, with paired intervals."""
    from glimmer_jax.data.scoring import paired_bootstrap

    pages = [one["page"] for one in found]
    tokens = np.mean([one["tokens"] for one in found])

    def nats(rows: list[dict[str, Any]]) -> list[float]:
        # Of a question, in units that average to nats a token over all tokens.
        return [-one["log_likelihood"] / tokens for one in rows]

    mine, theirs = ([one["match"] for one in rows] for rows in (found, baseline))
    result: dict[str, Any] = {
        "exact_match": paired_bootstrap(mine, theirs, groups=pages),
        "nats_per_token": paired_bootstrap(nats(found), nats(baseline), groups=pages),
    }
    result["tasks"] = {
        task: float(np.mean([one["match"] for one in found if one["task"] == task]))
        for task in TASKS
    }
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""

    def interval(one: dict[str, float]) -> str:
        return (
            f"{one['a']:.3f} | {one['difference']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"
        )

    lines = [
        f"n = {rows[0]['exact_match']['n']} questions",
        "| codec | bytes a token | encoded, tokens/s | decoded | relative error | exact match | "
        "against bf16 | nats a token | against bf16 |",
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
