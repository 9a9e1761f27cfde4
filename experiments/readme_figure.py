"""Draws the README's figure from the results tables of the model card.

    python -m experiments.readme_figure

After training new models, update the tables in glimmer_jax/checkpoints/README.md and rerun this.
"""

from pathlib import Path

from glimmer_jax.shipped import CHECKPOINTS

CARD = CHECKPOINTS / "README.md"
FIGURE = Path("docs") / "quality_compute.png"
MODELS = ("FiD", "LUMEN", "GLIMMER")
BASELINE = "BM25's first title"
QUALITY = "which function"  # exact match
COST = "GFLOP per question"
SPEED = "questions per second"


def results(card: str) -> dict[str, dict[str, str]]:
    """Row name -> column name -> cell: exact match of all test questions, cost and speed.

    Raises:
      ValueError: a row or column is missing.
    """
    quality, speed = _table(card, QUALITY), _table(card, SPEED)
    found = {
        name: {
            QUALITY: _cell(quality, f"{name}, test", QUALITY),
            COST: _cell(speed, name, COST),
            SPEED: _cell(speed, name, SPEED),
        }
        for name in MODELS
    }
    baseline, _, what = _cell(quality, "trivial baseline", QUALITY).partition(", ")
    if what != BASELINE:
        raise ValueError(f"{CARD.name}: expected the trivial baseline {BASELINE!r}, got {what!r}.")
    return {**found, BASELINE: {QUALITY: baseline}}


def _table(card: str, column: str) -> dict[str, dict[str, str]]:
    """Row name -> column name -> cell of the first table with a column."""
    for block in card.split("\n\n"):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        if block.startswith("|") and column in rows[0]:
            return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    raise ValueError(f"{CARD.name}: no table has a column {column!r}.")


def _cell(table: dict[str, dict[str, str]], row: str, column: str) -> str:
    if row not in table or column not in table[row]:
        raise ValueError(f"{CARD.name}: the table has no row {row!r} with a column {column!r}.")
    return table[row][column]


def plot(table: dict[str, dict[str, str]], path: Path) -> None:
    """Writes a PNG: exact match over counted compute, one point per model."""
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name in MODELS:
        row = table[name]
        cost, quality = float(row[COST]), 100 * float(row[QUALITY])
        label = f"{name}, {float(row[SPEED]):.0f} questions/s"
        axes.scatter([cost], [quality], s=70, zorder=2, label=label)
    baseline = 100 * float(table[BASELINE][QUALITY])
    axes.axhline(baseline, color="grey", linestyle="--", linewidth=1, zorder=1)
    axes.annotate(
        BASELINE, (0.01, baseline), xycoords=("axes fraction", "data"), va="bottom", color="grey"
    )
    costs = [float(table[name][COST]) for name in MODELS]
    best = max(100 * float(table[name][QUALITY]) for name in MODELS)
    axes.set_xlim(0, 1.25 * max(costs))
    axes.set_ylim(baseline - 3, best + 4)
    axes.set_xlabel("GFLOP per question")
    axes.set_ylabel("exact match, %")
    axes.set_title("Built-in corpus, which function, held-out modules", fontsize=11)
    axes.legend(loc="center right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    # Without matplotlib's version in the file, an unchanged figure has unchanged bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    plot(results(CARD.read_text(encoding="utf-8")), FIGURE)
    print(f"Wrote {FIGURE}.")
