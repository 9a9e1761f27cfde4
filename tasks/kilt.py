"""KILT (arXiv 2009.02252): eleven tasks, and GLIMMER's mixture of six at equal rates.

    kilt_glimmer                          the mixture of these six tasks (arXiv 2306.10231):
      kilt_nq  kilt_triviaqa  kilt_hotpotqa       questions          exact match, F1
      kilt_fever                                  claims             accuracy
      kilt_structured_zeroshot  kilt_trex         subject and slot   accuracy
    kilt_aidayago2  kilt_wned  kilt_cweb  marked mentions            accuracy of the page's title
    kilt_eli5  kilt_wow                   long answers, dialogue     Rouge-L, F1

Files are `<DATA_DIR>/<task>-<split>.jsonl`, written by `--run_mode=retrieve` from KILT's own files
(docs/kilt.md). Metrics are KILT's official ones and the recall of the reranker.
"""

import seqio

from glimmer_jax.data.retrieved_tasks import register
from glimmer_jax.kilt.files import TASKS
from glimmer_jax.metrics.kilt import task_metrics
from glimmer_jax.metrics.reranking import reranked_recall

# What this module registers; read before seqio is imported.
NAMES = (
    "kilt_glimmer",
    "kilt_aidayago2",
    "kilt_cweb",
    "kilt_eli5",
    "kilt_fever",
    "kilt_hotpotqa",
    "kilt_nq",
    "kilt_structured_zeroshot",
    "kilt_trex",
    "kilt_triviaqa",
    "kilt_wned",
    "kilt_wow",
)
GLIMMER = ("nq", "triviaqa", "hotpotqa", "fever", "structured_zeroshot", "trex")
METRICS = {
    "question answering": ("exact_match", "f1"),
    "fact checking": ("accuracy",),
    "slot filling": ("accuracy",),
    "entity linking": ("accuracy",),
    "long answers": ("rougel", "f1"),
    "dialogue": ("rougel", "f1"),
}

for _name, _task in TASKS.items():
    _metrics = [task_metrics(*METRICS[_task.kind]), reranked_recall]
    register(f"kilt_{_name}", _name, _metrics, _task.sizes)

seqio.MixtureRegistry.add("kilt_glimmer", [f"kilt_{name}" for name in GLIMMER], default_rate=1.0)
