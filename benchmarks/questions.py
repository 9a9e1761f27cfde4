"""Paired comparison of models on held-out questions of the built-in tasks."""

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
    """Writes the built-in corpus and its questions with passages, if missing."""
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
    """Held-out questions of the built-in tasks."""

    def __init__(self, data: Path, num_examples: int):
        from glimmer_jax.data import pipeline, retrieved_tasks

        retrieved_tasks.configure(data / "retrieved")
        pipeline.import_tasks("tasks.pydocs")
        self._data, self._count = data, num_examples

    def ask(self, model: GlimmerModel, params: Any, passages: Passages) -> list[dict[str, Any]]:
        """Answers all questions: `{"task", "page", "match", "log_likelihood", "tokens"}` of each."""
        from glimmer_jax.data.evaluation import Evaluation
        from glimmer_jax.metrics import qa
        from glimmer_jax.storage.json_lines import read_json_lines

        scored: list[tuple[float, float]] = []
        answer, score = jax.jit(model.predict_batch_with_aux), jax.jit(model.score_batch)

        def predict(batch: dict[str, Any]) -> Any:
            inputs = {name: x for name, x in batch.items() if name != "passage_ids"}
            tokens, aux = answer(params, inputs)
            counts = batch["decoder_loss_weights"].sum(-1)
            # In the order of the examples, followed by the padding rows of the last batch.
            scored.extend(zip(np.asarray(score(params, inputs)), counts, strict=True))
            if "gold_passages" in batch:
                aux = {**aux, "gold_passages": batch["gold_passages"]}
            return tokens, aux

        results = []
        for task in TASKS:
            scored.clear()
            dev = Evaluation(
                f"pydocs_{task}", "test", LENGTHS, 16, passages=passages, num_examples=self._count
            )
            dev.run(predict)
            (records,) = dev.predictions().values()
            gold = {
                str(question["id"]): question
                for _, question in read_json_lines(self._data / "retrieved" / f"{task}-test.jsonl")
            }
            for record, (value, count) in zip(records, scored[: len(records)], strict=True):
                outputs = gold[record["id"]]["output"]
                answers = [output["answer"] for output in outputs if "answer" in output]
                pages = [p for output in outputs for p in output.get("provenance", [])]
                results.append(
                    {
                        "task": task,
                        "page": str(pages[0]["wikipedia_id"]) if pages else record["id"],
                        "match": qa.match_of(answers, record["prediction"]),
                        "log_likelihood": float(value),
                        "tokens": float(count),
                    }
                )
        return results


def compare(results: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match and nats per token relative to the baseline, with paired intervals."""
    from glimmer_jax.metrics.qa import paired_bootstrap

    pages = [result["page"] for result in results]
    tokens = np.mean([result["tokens"] for result in results])

    def nats(rows: list[dict[str, Any]]) -> list[float]:
        # Per question, normalised so that the mean is nats per token over all tokens.
        return [-row["log_likelihood"] / tokens for row in rows]

    matches, expected = ([row["match"] for row in rows] for rows in (results, baseline))
    comparison: dict[str, Any] = {
        "exact_match": paired_bootstrap(matches, expected, groups=pages),
        "nats_per_token": paired_bootstrap(nats(results), nats(baseline), groups=pages),
    }
    comparison["tasks"] = {
        task: float(np.mean([row["match"] for row in results if row["task"] == task]))
        for task in TASKS
    }
    return comparison


def interval(x: dict[str, float]) -> str:
    """Two cells of a table: the value, and its difference from the baseline with the interval."""
    return f"{x['a']:.3f} | {x['difference']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})"
