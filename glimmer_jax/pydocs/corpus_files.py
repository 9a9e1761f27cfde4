"""The built-in corpus and its questions as files, as a user's own corpus would come."""

from pathlib import Path

from glimmer_jax.pydocs import corpus, questions
from glimmer_jax.storage.json_lines import write_json_lines


def write_corpus(directory: str | Path) -> dict[str, int]:
    """Writes `corpus.jsonl` and `questions/<task>-<split>.jsonl`; returns lines per file.

    A rewrite of the same corpus with the same Python gives the same bytes.
    """
    root = Path(directory)
    files = {"corpus.jsonl": list(corpus.passages())}
    for (task, split), examples in questions.all_tasks().items():
        files[f"questions/{task}-{split}.jsonl"] = examples
    return {name: write_json_lines(root / name, records) for name, records in files.items()}
