"""Mode `score`: metrics of a prediction file.

With gin, computes our metrics with bootstrap intervals. With `--gold` and `--guess`, computes
KILT's official scores, which are comparable with published results.
"""

import json
from collections.abc import Sequence

from glimmer_jax.metrics.kilt import KS, kilt_scores
from glimmer_jax.metrics.qa import score_file
from glimmer_jax.modes import checks, outputs
from glimmer_jax.storage import folder


def score(
    predictions: str,
    questions: str,
    output_path: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Prints and returns `{metric: {"n", "mean", "low", "high"}}`.

    Args:
      predictions: JSON Lines of `{"id", "prediction", …}`, or KILT's format.
      questions: labelled task file.
      output_path: gets the metrics as JSON.
      seed: of the bootstrap.
      overwrite: replace an existing `output_path`.

    Raises:
      ValueError: a file is missing or malformed, or `output_path` holds something else.
    """
    checks.seed(seed)
    predictions_path = checks.existing_file("PREDICTIONS", predictions)
    scores = score_file(predictions_path, checks.existing_file("QUESTIONS", questions), seed)
    for name, row in scores.items():
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        print(f"{name:12}  {row['mean']:.4f}  ({interval}, n = {row['n']})")
    if output_path is not None:
        data = (json.dumps(scores, indent=2) + "\n").encode()
        # Scoring is quick and repeatable: a rerun finds what it would write.
        if folder.read_file(*folder.of_file(output_path)) != data:
            outputs.replaceable("OUTPUT_PATH", output_path, overwrite)
            folder.write_file(*folder.of_file(output_path), data)
    return scores


def official(gold: str, guess: str, ks: Sequence[int] = KS) -> dict[str, dict | None]:
    """Prints KILT's official scores as JSON and returns them (`metrics.kilt.kilt_scores`).

    Args:
      gold: labelled KILT file.
      guess: KILT submission, with a guess for each gold question.
      ks: numbers of pages for precision@k, recall@k and success_rate@k.

    Raises:
      ValueError: a file is missing or malformed, or `ks` are not distinct positive numbers.
    """
    gold_path = checks.existing_file("--gold", gold)
    scores = kilt_scores(gold_path, checks.existing_file("--guess", guess), ks)
    print(json.dumps(scores, indent=2))
    return scores
