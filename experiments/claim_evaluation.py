"""Evaluates one trained arm of `experiments.claims`; a process of its own, started by that command.

    python -m experiments.claim_evaluation JOB.json RESULT.json

An answer depends only on the set of passages that the model reads. Each passage is therefore scored
once, every distinct set of a question is answered once, and all values of K and m and all orders of
the passages are computed from these answers. Questions per second are measured separately, with the
complete model and its memory.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim_arms import DEPTH, THRESHOLDS, Selection
from experiments.claim_results import NATS_UNIT, encode_numbers, pack
from experiments.train_pydocs import LENGTHS
from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.kilt.examples import answers, read_examples
from glimmer_jax.memory.lookup import LookupConfig
from glimmer_jax.metrics import qa
from glimmer_jax.models.cost import question_cost
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes.build_memory import build_memory
from glimmer_jax.modes.settings import EncoderConfig
from glimmer_jax.pydocs import baselines
from glimmer_jax.runtime.host_memory import keep_freed_memory
from glimmer_jax.runtime.progress import Progress
from glimmer_jax.serving.predictor import Predictor
from glimmer_jax.weights.load import load

BATCH = 32
ROUNDS = 3  # of measuring speed; the median counts


@dataclasses.dataclass(frozen=True)
class Job:
    """An evaluation."""

    runs: dict[str, str]  # task -> run of the model that answers its questions
    reranks: bool  # whether the model has scores; otherwise only the retriever's order exists
    selections: list[list[Any]]  # fields of `Selection`
    questions: str  # folder of the retrieved files, with `DEPTH` passages per question
    passages: str
    scratch: str  # folder for the memory, removed at the end
    split: str = "test"  # or dev
    recalls: list[list[Any]] = dataclasses.field(default_factory=list)  # selections without answers
    num_examples: int | None = None  # of each task
    adaptive: bool = False  # also choose m per question
    nats: bool = False  # also measure the likelihood of the right answers
    speed_questions: int | None = None  # measures speed with so many questions, and nothing else


def main(argv: Sequence[str] | None = None) -> None:
    """Reads a `Job` and writes its results, both JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    args = parser.parse_args(argv)
    keep_freed_memory()
    job = Job(**json.loads(args.job.read_text(encoding="utf-8")))
    args.result.write_text(json.dumps(run(job)) + "\n", encoding="utf-8")


def run(job: Job) -> dict[str, Any]:
    """`{"results": {selection: {"gflop", …}}}`; see `_quality` and `_speed` for the values."""
    passages = Passages.open(job.passages)
    lines = read_questions(job)
    results: dict[str, Any] = {}
    try:
        for path in dict.fromkeys(job.runs.values()):
            tasks = [task for task, of_task in job.runs.items() if of_task == path]
            asked = {task: lines[task] for task in tasks}
            # Encoding the corpus once pays off, except for a few questions.
            read = DEPTH * sum(len(of_task) for of_task in asked.values())
            memory = job.speed_questions is not None or read > len(passages)
            scratch = Path(job.scratch) if memory else None
            model = TrainedModel(path, job.reranks, passages, scratch)
            if job.speed_questions is None:
                found = _quality(model, asked, job)
            else:
                found = _speed(model, [x for xs in asked.values() for x in xs], job)
            for key, values in found.items():
                merged = results.setdefault(key, {})
                for name, value in values.items():
                    if isinstance(value, dict):
                        merged.setdefault(name, {}).update(value)
                    else:
                        merged[name] = value
    finally:
        shutil.rmtree(job.scratch, ignore_errors=True)
    return {"results": results}


def read_questions(job: Job) -> dict[str, list[dict[str, Any]]]:
    """The retrieved examples of each task."""
    folder = Path(job.questions)
    return {
        task: list(read_examples(folder / f"{task}-{job.split}.jsonl"))[: job.num_examples]
        for task in job.runs
    }


class TrainedModel:
    """A checkpoint that reranks or reads all passages, from memory or from tokens."""

    def __init__(self, path: str, reranks: bool, passages: Passages, scratch: Path | None):
        """Builds a memory in `scratch`, if one is given and the model has memory layers."""
        self._path, self._passages = path, passages
        config = load(path).answering_config()
        # Reading a given set of passages needs no scores.
        self.reader = dataclasses.replace(
            config, rerank_layers=0, num_kept=None, separate_reranker=False
        )
        self.reranker = config if reranks else None
        self._memory: str | None = None
        if config.memory_layers and scratch is not None:
            self._memory = str(scratch / Path(path).name)
            build_memory(
                EncoderConfig(
                    path, passages_dir=str(passages.path), max_length=check_lengths(LENGTHS).passage
                ),
                self._memory,
                measure_error=False,
            )

    def config(self, selection: Selection) -> GlimmerConfig:
        """The complete model that keeps m of K passages; without scores it reads all."""
        if self.reranker is None:
            return self.reader
        return dataclasses.replace(self.reranker, num_kept=selection.kept)

    def gflop(self, selection: Selection) -> float:
        """Counted cost of a question, 10^9 multiply-adds."""
        q, t, k, p = sizes(selection.retrieved)
        config = self.config(selection)
        return question_cost(config, passages=k, question=q, passage=p, answer=t).total / 1e9

    @functools.cached_property
    def records(self) -> dict[int, Mapping[str, Any]]:
        """Passage id -> record."""
        return {record["id"]: record for record in self._passages.records()}

    def predictor(self, config: GlimmerConfig, num_passages: int) -> Predictor:
        """A predictor for K passages."""
        return Predictor.load(
            self._path,
            sizes(num_passages),
            model=GlimmerModel(config),
            passages_dir=self._passages,
            memory_dir=self._memory,
            lookup=LookupConfig(bytes_per_device=2**30),
            batch_sizes=(BATCH,),
        )

    def scores(self, lines: Sequence[Mapping[str, Any]], depth: int) -> np.ndarray:
        """The reranker's scores of the first passages, float32 `[n, depth]`; -inf for absent ones."""
        assert self.reranker is not None
        predictor = self.predictor(dataclasses.replace(self.reranker, num_kept=1), depth)
        progress = Progress("scores", len(lines), "questions", emit=_print)
        rows = []
        for batch in _batches(lines):
            read = predictor.read(predictor.prepare(batch).batch)
            rows.append(np.asarray(read.aux["passage_scores"])[: len(batch)])
            progress.advance(len(batch))
        return np.concatenate(rows)

    def hits(
        self, lines: Sequence[Mapping[str, Any]], sets: Mapping[int, set[tuple[int, ...]]]
    ) -> dict[tuple[int, ...], bool]:
        """Whether each answer is right.

        Args:
          lines: retrieved examples.
          sets: m -> `(number of the question, ids of at most m passages)`, flat tuples.
        """
        found: dict[tuple[int, ...], bool] = {}
        progress = Progress("answers", sum(map(len, sets.values())), "answers", emit=_print)
        for predictor, chunk, asked in self._batches(lines, sets):
            for key, answer in zip(chunk, predictor.answer(asked), strict=True):
                text = answer["output"][0]["answer"]
                found[key] = bool(qa.match_of(answers(lines[key[0]]), text))
            progress.advance(len(chunk))
        return found

    def nats(
        self, lines: Sequence[Mapping[str, Any]], sets: Mapping[int, set[tuple[int, ...]]]
    ) -> dict[tuple[int, ...], float]:
        """Negative log-likelihood per token of the first right answer; arguments of `hits`."""
        found: dict[tuple[int, ...], float] = {}
        for predictor, chunk, asked in self._batches(lines, sets):
            right = [answers(lines[number])[:1] for number, *_ in chunk]
            tokens_B1T = np.stack([predictor.encode_candidates(one) for one in right])
            batch = predictor.prepare(asked, tokens_B1T).batch
            _, aux = predictor.predict(predictor.load_memory(batch))
            sums = np.asarray(aux["candidate_scores"])[: len(chunk), 0]
            counts = (tokens_B1T[:, 0] > 0).sum(-1)
            found |= dict(zip(chunk, (-sums / counts).tolist(), strict=True))
        return found

    def _batches(
        self, lines: Sequence[Mapping[str, Any]], sets: Mapping[int, set[tuple[int, ...]]]
    ) -> Iterator[tuple[Predictor, Sequence[tuple[int, ...]], list[dict[str, Any]]]]:
        """The predictor, the keys and the questions of each batch; arguments of `hits`."""
        for kept, keys in sorted(sets.items()):
            predictor = self.predictor(self.reader, kept)
            for chunk in _batches(sorted(keys)):
                yield (
                    predictor,
                    chunk,
                    [
                        {**lines[number], "retrieved": [{"id": x} for x in ids]}
                        for number, *ids in chunk
                    ],
                )


def _quality(
    model: TrainedModel, lines: Mapping[str, list[dict[str, Any]]], job: Job
) -> dict[str, Any]:
    """By selection: `gflop` and, by task, packed `hits`, `exact_match` and `recall` of the kept.

    With `job.nats` also `nats` by task: encoded, in units of `NATS_UNIT`.
    """
    selections = [Selection(*fields) for fields in job.selections]
    counted = [Selection(*fields) for fields in job.recalls]
    # The tasks are answered together: a program is compiled once.
    examples = [line for of_task in lines.values() for line in of_task]
    depth = max((s.retrieved for s in (*selections, *counted) if s.order == "learned"), default=0)
    scores = model.scores(examples, depth) if job.reranks and depth else None
    names = dict.fromkeys(selection.order for selection in (*selections, *counted))
    orders = {name: _order(name, examples, scores, model) for name in names}
    kept = {
        selection: [
            _kept(line["retrieved"], ranked, selection)
            for line, ranked in zip(examples, orders[selection.order], strict=True)
        ]
        for selection in (*selections, *counted)
    }
    keys = {
        selection: [(i, *(x["id"] for x in read)) for i, read in enumerate(kept[selection])]
        for selection in selections
    }
    sets: dict[int, set[tuple[int, ...]]] = {}
    for selection in selections:
        sets.setdefault(selection.kept, set()).update(keys[selection])
    right = model.hits(examples, sets)
    recall = {
        selection: np.array([any(x["gold"] for x in read) for read in rows])
        for selection, rows in kept.items()
    }
    hits = {selection: np.array([right[key] for key in rows]) for selection, rows in keys.items()}
    costs = {selection: np.full(len(examples), model.gflop(selection)) for selection in selections}
    tables = {"gflop": costs, "hits": hits, "recall": recall}
    if job.nats:
        nats = model.nats(examples, sets)
        tables["nats"] = {
            selection: np.array([nats[key] for key in rows]) for selection, rows in keys.items()
        }
    by_key: dict[str, dict[str, np.ndarray]] = {
        selection.key: {
            name: found[selection] for name, found in tables.items() if selection in found
        }
        for selection in (*counted, *selections)
    }
    for threshold in THRESHOLDS if job.adaptive and scores is not None else ():
        chosen = list(enumerate(_choose(selections, scores, threshold)))
        by_key[f"mass:{threshold}"] = {
            name: np.array([found[selection][i] for i, selection in chosen])
            for name, found in tables.items()
        }
    return {key: _by_task(found, lines) for key, found in by_key.items()}


def _by_task(found: Mapping[str, np.ndarray], lines: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The values of all questions as those of tasks; the cost is the mean over tasks."""
    ends = np.cumsum([len(of_task) for of_task in lines.values()])[:-1]
    parts = {
        name: dict(zip(lines, np.split(values, ends), strict=True))
        for name, values in found.items()
    }
    result: dict[str, Any] = {
        "recall": {task: float(part.mean()) for task, part in parts["recall"].items()}
    }
    if "hits" in parts:
        result["hits"] = {task: pack(part) for task, part in parts["hits"].items()}
        result["exact_match"] = {task: float(part.mean()) for task, part in parts["hits"].items()}
        if "nats" in parts:
            result["mean_nats"] = {task: float(x.mean()) for task, x in parts["nats"].items()}
            result["nats"] = {
                task: encode_numbers(np.rint(part / NATS_UNIT).astype(int).tolist())
                for task, part in parts["nats"].items()
            }
        result["gflop"] = float(np.mean([part.mean() for part in parts["gflop"].values()]))
    return result


def _kept(
    retrieved: Sequence[Mapping[str, Any]], ranked: Sequence[int], selection: Selection
) -> list[Mapping[str, Any]]:
    """The first m of the first K passages, in the retriever's order."""
    first = [i for i in ranked if i < min(selection.retrieved, len(retrieved))]
    return [retrieved[i] for i in sorted(first[: selection.kept])]


def _order(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    scores: np.ndarray | None,
    model: TrainedModel,
) -> list[list[int]]:
    """Ranks of the retrieved passages of each question, best first."""
    if name == "learned":
        assert scores is not None
        return [np.argsort(-row, kind="stable").tolist() for row in scores]
    if name == "rule":
        return [
            baselines.rule_order(line["input"], [model.records[x["id"]] for x in line["retrieved"]])
            for line in lines
        ]
    gold = [[bool(passage["gold"]) for passage in line["retrieved"]] for line in lines]
    if name == "retriever":
        return [list(range(len(marks))) for marks in gold]
    assert name == "oracle", name
    return [sorted(range(len(marks)), key=lambda i: (not marks[i], i)) for marks in gold]


def _choose(
    selections: Sequence[Selection], scores: np.ndarray, threshold: float
) -> list[Selection]:
    """The smallest selection whose passages have this share of the softmax over the first K."""
    ordered = sorted(selections, key=lambda selection: selection.kept)
    first = scores[:, : ordered[0].retrieved]
    weights = np.exp(first - first.max(axis=1, keepdims=True))
    mass = np.cumsum(-np.sort(-weights, axis=1), axis=1) / weights.sum(axis=1, keepdims=True)
    reached = [mass[:, selection.kept - 1] >= threshold for selection in ordered[:-1]]
    reached.append(np.ones(len(scores), bool))
    return [ordered[i] for i in np.argmax(np.stack(reached, axis=1), axis=1)]


def _speed(model: TrainedModel, lines: Sequence[dict[str, Any]], job: Job) -> dict[str, Any]:
    """By selection: `gflop`, `questions_per_second` and `other_load`.

    The rate leaves out tokenisation and compilation. `other_load` is the number of cores that other
    processes kept busy around the measurement; None if unknown.
    """
    results: dict[str, Any] = {}
    step = max(1, len(lines) // job.speed_questions) if job.speed_questions else 1
    for fields in job.selections:
        selection = Selection(*fields)
        predictor = model.predictor(model.config(selection), selection.retrieved)
        asked = list(lines[::step][: job.speed_questions])
        prepared = [predictor.prepare(batch).batch for batch in _batches(asked)]
        predictor.predict(prepared[0])
        before = other_load()
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for batch in predictor.prefetch(iter(prepared)):
                predictor.predict(batch)
            seconds.append(time.perf_counter() - began)
        rate = len(asked) / statistics.median(seconds)
        loads = [load for load in (before, other_load()) if load is not None]
        results[selection.key] = {
            "gflop": model.gflop(selection),
            "questions_per_second": rate,
            "other_load": max(loads, default=None),
        }
        _print(f"speed: {selection.key} {rate:.1f} questions/s")
    return results


def other_load(seconds: float = 1.0) -> float | None:
    """Cores that are busy while this process sleeps; None where /proc/stat does not say."""

    def ticks() -> tuple[int, int]:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]  # all, idle and waiting for disks

    try:
        first = ticks()
        time.sleep(seconds)
        total, idle = (b - a for a, b in zip(first, ticks(), strict=True))
    except (OSError, ValueError, IndexError):
        return None
    return round((os.cpu_count() or 1) * (1 - idle / max(total, 1)), 2)


def sizes(num_passages: int) -> Lengths:
    """Q, T, K and P for K passages."""
    return check_lengths(LENGTHS)._replace(passages=num_passages)


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
