"""The built-in corpus: three tasks over retrieved files, and their mixture at equal rates.

    pydocs_which_function       a clause of a docstring        -> the qualified name
    pydocs_slot_filling         "json.dumps [SEP] default of indent" -> None
    pydocs_fact_verification    a claim -> SUPPORTS or REFUTES

Files are `<DATA_DIR>/<task>-<split>.jsonl`, written by `--run_mode=retrieve`.
"""

from collections.abc import Callable
from typing import Any

import seqio

from glimmer_jax.data import scoring
from glimmer_jax.data.evaluation import reranked_recall
from glimmer_jax.data.retrieved import register

METRICS: dict[str, list[Callable[..., Any]]] = {
    "which_function": [scoring.exact_match, scoring.f1, reranked_recall],
    "slot_filling": [scoring.accuracy, reranked_recall],
    "fact_verification": [scoring.accuracy, reranked_recall],
}

for _task, _metrics in METRICS.items():
    register(f"pydocs_{_task}", _task, _metrics)

seqio.MixtureRegistry.add("pydocs", [f"pydocs_{task}" for task in METRICS], default_rate=1.0)
