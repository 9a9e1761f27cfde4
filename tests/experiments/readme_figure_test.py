"""The README's figure and table come from the model card."""

import re

import pytest

from experiments import readme_figure
from experiments.readme_figure import COST, MODELS, QUALITY

CARD = readme_figure.CARD.read_text(encoding="utf-8")
README = (readme_figure.CARD.parents[2] / "README.md").read_text(encoding="utf-8")


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_readme_table_has_the_model_cards_results():
    table = readme_figure.results(CARD)
    for name in MODELS:
        (row,) = re.findall(rf"^\| {name} .*$", README, re.MULTILINE)
        assert cells(row)[-2:] == [table[name][QUALITY], table[name][COST]]


def test_figure_is_a_png_and_reproducible(tmp_path):
    table = readme_figure.results(CARD)
    for name in ("a.png", "b.png"):
        readme_figure.plot(table, tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG") and first == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "old, missing",
    [
        ("| LUMEN |", "LUMEN"),
        ("| LUMEN, test |", "LUMEN, test"),
        (f"| {COST} |", COST),
        (f"| {QUALITY} |", QUALITY),
    ],
)
def test_card_without_a_row_or_column_is_rejected(old, missing):
    with pytest.raises(ValueError, match=missing):
        readme_figure.results(CARD.replace(old, "| other |"))


def test_another_baseline_is_rejected():
    with pytest.raises(ValueError, match="BM25's first title.*'a rule'"):
        readme_figure.results(CARD.replace(f", {readme_figure.BASELINE}", ", a rule"))
