"""Plots of `experiments.claims`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.claim_analysis import Study

QUALITY = "claims_quality.png"
PASSAGES = "claims_passages.png"
NAMES = {"fid": "FiD", "lumen": "LUMEN", "glimmer": "GLIMMER"}
# A colour per curve that is readable in grey and for most colour-blind people.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def write(study: Study, folder: Path) -> dict[str, str]:
    """Writes the plots that have data; returns file name -> caption."""
    curves = _curves(study)
    if not curves:
        return {}
    import matplotlib

    matplotlib.use("Agg")  # works without a display
    over = _quality(study, curves, folder / QUALITY)
    _passages(study, curves, folder / PASSAGES)
    # Differences are paired by seed, and their intervals much narrower than these.
    bands = "bands: 95 % t intervals of each mean over seeds"
    return {
        QUALITY: f"Exact match over {over}; {bands}",
        PASSAGES: f"Exact match over retrieved and over kept passages; {bands}",
    }


Curve = list[tuple[int, int, str]]  # (K, m, key of the selection)


def _curves(study: Study) -> dict[tuple[str, str], Curve]:
    """(arm, label) -> its points by K: a curve per system, and per m for GLIMMER."""
    curves: dict[tuple[str, str], Curve] = {}
    for arm, name in NAMES.items():
        for key in study.selections(arm):
            order, retrieved, kept = (key.split(":") + ["", ""])[:3]
            if order != ("learned" if arm == "glimmer" else "retriever") or int(retrieved) > 20:
                continue
            label = f"{name}, {kept} kept" if arm == "glimmer" else f"{name}, all kept"
            curves.setdefault((arm, label), []).append((int(retrieved), int(kept), key))
    return {curve: sorted(points) for curve, points in curves.items()}


def _draw(
    axes: Any, study: Study, curves: dict[tuple[str, str], Curve], x_of: Callable[..., float | None]
) -> None:
    """Mean over seeds with a band: the t interval. Points without x are left out."""
    for colour, ((arm, label), points) in zip(COLOURS, curves.items(), strict=False):
        xs, means, lows, highs = [], [], [], []
        for retrieved, kept, key in points:
            _, found = study.contrast([(arm, key, 1.0)])
            x = x_of(arm, retrieved, kept, key)
            if found is None or x is None:
                continue
            xs.append(x)
            means.append(100 * found.mean)
            one = abs(found.t[0]) == float("inf")
            lows.append(100 * (found.mean if one else found.t[0]))
            highs.append(100 * (found.mean if one else found.t[1]))
        if xs:
            axes.plot(xs, means, marker="o", markersize=4, color=colour, label=label)
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _quality(study: Study, curves: dict[tuple[str, str], Curve], path: Path) -> str:
    """Writes the plot; returns what its x axes show."""
    from matplotlib import pyplot

    def compute(arm: str, _: int, __: int, key: str) -> float:
        return study.gflop(arm, key)

    def speed(arm: str, _: int, __: int, key: str) -> float | None:
        measured = study.speed(arm, key)
        return None if measured is None else measured["questions_per_second"]

    has_speed = any(study.speed(arm, key) for (arm, _), rows in curves.items() for *_, key in rows)
    panes = 2 if has_speed else 1
    figure, all_axes = pyplot.subplots(
        1, panes, figsize=(5.2 * panes, 4.4), layout="constrained", sharey=True, squeeze=False
    )
    _draw(all_axes[0, 0], study, curves, compute)
    all_axes[0, 0].set(xlabel="GFLOP per question, counted", ylabel="exact match, %")
    if has_speed:
        _draw(all_axes[0, 1], study, curves, speed)
        all_axes[0, 1].set(xlabel="questions per second, measured")
    for axes in all_axes[0]:
        _logarithmic(axes)
    points = ", ".join(str(k) for k in sorted({k for rows in curves.values() for k, *_ in rows}))
    _finish(figure, all_axes[0, 0], path, f"Points along a curve: K = {points} retrieved passages")
    return "counted compute and over measured speed" if has_speed else "counted compute"


def _logarithmic(axes: Any) -> None:
    """A logarithmic x axis with few plain labels, which do not overlap."""
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _passages(study: Study, curves: dict[tuple[str, str], Curve], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True
    )
    _draw(left, study, curves, lambda arm, retrieved, kept, key: float(retrieved))
    left.set(xlabel="retrieved passages, K", ylabel="exact match, %")
    left.set_xticks(sorted({k for rows in curves.values() for k, *_ in rows}))
    by_kept: dict[tuple[str, str], Curve] = {}
    for (arm, _), points in curves.items():
        for retrieved, kept, key in points if arm == "glimmer" else ():
            by_kept.setdefault((arm, f"K = {retrieved}"), []).append((retrieved, kept, key))
    by_kept = {curve: points for curve, points in by_kept.items() if len(points) > 1}
    _draw(right, study, by_kept, lambda arm, retrieved, kept, key: float(kept))
    right.set(xlabel="kept passages, m, of GLIMMER")
    if by_kept:
        right.set_xticks(sorted({m for rows in by_kept.values() for _, m, _ in rows}))
        right.legend(fontsize=8, frameon=False, loc="lower right")
    _finish(figure, left, path, "")


def _finish(figure: Any, axes: Any, path: Path, title: str) -> None:
    """Adds a legend below the panes, where it covers no curve, and writes the file."""
    from matplotlib import pyplot

    handles, labels = axes.get_legend_handles_labels()
    ncols = 4 if len(figure.axes) > 1 else 2
    figure.legend(
        handles, labels, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=9)
    # Without matplotlib's version in the file, an unchanged figure has unchanged bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
