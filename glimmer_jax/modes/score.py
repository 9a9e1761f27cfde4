"""Mode `score`: how good a file of answers is.

With gin, our metrics of a prediction file, with intervals. With `--gold` and `--guess`, KILT's
official scores, for numbers that are compared with published ones.
"""

import json
from collections.abc import Sequence

from glimmer_jax.metrics.kilt import KS, kilt_scores
from glimmer_jax.metrics.qa import score_file
from glimmer_jax.modes import checks
from glimmer_jax.storage import folder


def score(
    predictions: str, questions: str, output_path: str | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Prints, and returns, `{metric: {"n", "mean", "low", "high"}}`.

    Args:
      predictions: JSON Lines of `{"id", "prediction", …}`, or KILT's form.
      questions: the task file, labelled.
      output_path: gets the metrics as JSON.
      seed: of the bootstrap.

    Raises:
      ValueError: missing or malformed files.
    """
    predictions_path = checks.existing_file("PREDICTIONS", predictions)
    found = score_file(predictions_path, checks.existing_file("QUESTIONS", questions), seed)
    for name, one in found.items():
        interval = f"{one['low']:.4f} to {one['high']:.4f}"
        print(f"{name:12}  {one['mean']:.4f}  ({interval}, n = {one['n']})")
    if output_path is not None:
        text = json.dumps(found, indent=2) + "\n"
        folder.write_file(*folder.of_file(output_path), text.encode())
    return found


def official(gold: str, guess: str, ks: Sequence[int] = KS) -> dict[str, dict | None]:
    """Prints, and returns, KILT's official scores as JSON (`kilt_metrics.kilt_scores`).

    Args:
      gold: labelled KILT file.
      guess: KILT submission, a guess for each gold question.
      ks: lengths of the lists whose precision, recall and success rate count.

    Raises:
      ValueError: missing or malformed files, or ks.
    """
    gold_path = checks.existing_file("--gold", gold)
    found = kilt_scores(gold_path, checks.existing_file("--guess", guess), ks)
    print(json.dumps(found, indent=2))
    return found
