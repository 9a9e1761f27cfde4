"""Held-out questions of the built-in tasks, asked of one model after another, and compared."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.command import glimmer
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.pydocs.questions import TASKS

LENGTHS: dict[str, Any] = {"inputs": 36, "targets": 32, "passages": (10, 80)}


def write_data(data: Path) -> None:
    """The built-in corpus and its questions with passages, where they are not there."""
    if not (data / "passages").exists():
        glimmer(
            "passages",
            "pydocs_passages",
            CORPUS_DIR=data / "corpus",
            PASSAGES_DIR=data / "passages",
        )
    if not (data / "retrieved").exists():
        glimmer(
            "retrieve",
            "pydocs_retrieve",
            PASSAGES_DIR=data / "passages",
            QUESTIONS=f"{data}/corpus/questions/*.jsonl",
            DATA_DIR=data / "retrieved",
        )


class Questions:
    """Held-out questions of the built-in tasks, and how a model does on each."""

    def __init__(self, data: Path, num_examples: int):
        from glimmer_jax.data import pipeline, retrieved_tasks

        retrieved_tasks.configure(data / "retrieved")
        pipeline.import_tasks("tasks.pydocs")
        self._data, self._count = data, num_examples

    def ask(self, model: GlimmerModel, params: Any, passages: Passages) -> list[dict[str, Any]]:
        """`{"task", "page", "match", "log_likelihood", "tokens"}` of each question, in order."""
        from glimmer_jax.data.evaluation import Evaluation
        from glimmer_jax.metrics import qa
        from glimmer_jax.storage.json_lines import read_json_lines

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
                        "match": qa.match_of(answers, record["prediction"]),
                        "log_likelihood": float(value),
                        "tokens": float(count),
                    }
                )
        return found


def compare(found: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match and nats a token that are lost against the baseline, with paired intervals."""
    from glimmer_jax.metrics.qa import paired_bootstrap

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


def interval(one: dict[str, float]) -> str:
    """Two cells of a table: the value, and its difference from the baseline with the interval."""
    return f"{one['a']:.3f} | {one['difference']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"
