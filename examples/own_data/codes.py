"""The task `codes`: the files `<DATA_DIR>/codes-<train|dev|test>.jsonl` of docs/own_data.md."""

from glimmer_jax.data.retrieved_tasks import register
from glimmer_jax.metrics import qa
from glimmer_jax.metrics.reranking import reranked_recall

NAMES = ("codes",)

register(NAMES[0], "codes", [qa.exact_match, qa.f1, reranked_recall])
