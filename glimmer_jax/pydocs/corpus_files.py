"""Writes the built-in corpus and its questions in the formats of a user's own corpus."""

from pathlib import Path

from glimmer_jax.pydocs import corpus, questions
from glimmer_jax.storage.json_lines import write_json_lines


def write_corpus(directory: str | Path) -> dict[str, int]:
    """Writes `corpus.jsonl` and `questions/<task>-<split>.jsonl`; returns the lines of each file.

    The same Python version always writes the same bytes.
    """
    root = Path(directory)
    files = {"corpus.jsonl": list(corpus.passages())}
    for (task, split), examples in questions.all_tasks().items():
        files[f"questions/{task}-{split}.jsonl"] = examples
    return {name: write_json_lines(root / name, records) for name, records in files.items()}
