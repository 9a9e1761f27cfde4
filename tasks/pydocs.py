"""The built-in corpus: three tasks over retrieved files, and their mixture at equal rates.

    pydocs_which_function       a clause of a docstring        -> the qualified name
    pydocs_slot_filling         "json.dumps [SEP] default of indent" -> None
    pydocs_fact_verification    a claim -> SUPPORTS or REFUTES

Files are `<DATA_DIR>/<task>-<split>.jsonl`, written by `--run_mode=retrieve`.

For training, the same questions exist with new synthetic names in every example:

    pydocs_renamed              all three tasks
    pydocs_renamed_titles       the same, which function every second time
    pydocs_<task>_renamed       one task
    pydocs_renamed_gold         all three tasks, with the gold passage only
    pydocs_<task>_renamed_gold  one task, likewise

Examples of these hold their passages themselves (no PASSAGES_DIR), up to `RENAMED_PASSAGES`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import seqio

from glimmer_jax.data import generated_tasks
from glimmer_jax.data.retrieved_tasks import register, retrieved_file
from glimmer_jax.kilt.examples import read_examples
from glimmer_jax.metrics import qa
from glimmer_jax.metrics.reranking import reranked_recall
from glimmer_jax.pydocs import corpus
from glimmer_jax.pydocs.questions import SHARES
from glimmer_jax.pydocs.renamed_questions import RenamedQuestions
from glimmer_jax.vocabulary import Vocabulary

# What this module registers; read before seqio is imported.
NAMES = (
    "pydocs",
    "pydocs_fact_verification",
    "pydocs_slot_filling",
    "pydocs_which_function",
    "pydocs_renamed",
    "pydocs_renamed_gold",
    "pydocs_renamed_titles",
    "pydocs_fact_verification_renamed",
    "pydocs_fact_verification_renamed_gold",
    "pydocs_slot_filling_renamed",
    "pydocs_slot_filling_renamed_gold",
    "pydocs_which_function_renamed",
    "pydocs_which_function_renamed_gold",
)
METRICS: dict[str, list[Callable[..., Any]]] = {
    "which_function": [qa.exact_match, qa.f1, reranked_recall],
    "slot_filling": [qa.accuracy, reranked_recall],
    "fact_verification": [qa.accuracy, reranked_recall],
}

for _task, _metrics in METRICS.items():
    register(f"pydocs_{_task}", _task, _metrics)

seqio.MixtureRegistry.add("pydocs", [f"pydocs_{task}" for task in METRICS], default_rate=1.0)

RENAMED_PASSAGES = 10
# Answers of `which_function` are the longest, and need more practice in the end.
TITLE_SHARES = {"which_function": 2.0}


def _renamed(
    tasks: tuple[str, ...],
    num_kept: int | None = None,
    shares: Mapping[str, float] = SHARES,
) -> RenamedQuestions:
    examples = {name: list(read_examples(retrieved_file(name, "train"))) for name in tasks}
    records = {record["id"]: record for record in corpus.train_texts()}
    return RenamedQuestions(
        examples, records, RENAMED_PASSAGES, Vocabulary("pydocs"), shares, num_kept=num_kept
    )


for _name, _tasks in {"": tuple(METRICS), **{f"{task}_": (task,) for task in METRICS}}.items():
    generated_tasks.register(f"pydocs_{_name}renamed", functools.partial(_renamed, _tasks))
    generated_tasks.register(
        f"pydocs_{_name}renamed_gold", functools.partial(_renamed, _tasks, num_kept=1)
    )
generated_tasks.register(
    "pydocs_renamed_titles", functools.partial(_renamed, tuple(METRICS), shares=TITLE_SHARES)
)
