"""Classes that are taken for each other, and samples whose loss stays high."""

from __future__ import annotations

from typing import Any

import numpy as np

from dltrain.debugger.report.drawing import INK, SERIES, sheet, short, svg
from dltrain.debugger.report.page import Section, plot, table, words
from dltrain.debugger.run import SavedRun

_NUMBERS = 15
"""Classes up to which the cells of a confusion matrix have numbers."""
_LABELS = 40
_PAIRS = 15
_SAMPLES = 25


def confusion(run: SavedRun) -> Section:
    """The matrix of the last evaluation, and the pairs that are most often taken for each other."""
    found = run.observations("confusion")
    if not found:
        return Section("Classes", [])
    step, value = found[-1]
    matrix = np.array(value["matrix"], dtype=np.float64)
    names = [str(name) for name in value["names"]] or [str(place) for place in range(len(matrix))]
    said = f"Held-out samples after step {step}: rows are true classes, columns are what was predicted, colours shares "
    said += "of a row. Look for dark cells beside the diagonal."
    return Section("Classes", [plot(_matrix(matrix, names), said), _pairs(matrix, names)])


def _matrix(matrix: Any, names: list[str]) -> str:
    side = min(6.5, 1.6 + 0.32 * len(names))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes = sheet(side, width=side + 0.7)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.grid(False)
    if len(names) <= _LABELS:
        axes.set_xticks(range(len(names)), [short(name, 16) for name in names], rotation=90 if _long(names) else 0)
        axes.set_yticks(range(len(names)), [short(name, 16) for name in names])
    if len(names) <= _NUMBERS:
        for row, column in np.argwhere(matrix > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{matrix[row, column]:g}", ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, ax=axes, pad=0.02, aspect=30, label="share of the true class").outline.set_visible(False)
    return svg(figure, "confusion matrix")


def _long(names: list[str]) -> bool:
    return max(map(len, names)) > 3


def _pairs(matrix: Any, names: list[str]) -> str:
    off = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-off, axis=None, kind="stable")[:_PAIRS]
    totals = np.maximum(matrix.sum(1), 1)
    rows = []
    for row, column in zip(*np.unravel_index(order, off.shape), strict=True):
        if off[row, column]:
            count = off[row, column]
            rows.append((names[row], names[column], f"{count:g}", f"{count / totals[row]:.1%}"))
    return table(("true", "taken for", "samples", "of the class"), rows, "Most frequent mistakes") if rows else ""


def hard_samples(run: SavedRun) -> Section:
    """Training samples by key whose loss stays high from evaluation to evaluation, and what LabelNoise found."""
    observed = [(step, losses) for step, losses in run.observations("losses") if losses]
    found = [each for each in run.findings() if each.rule == "LabelNoise"]
    if not observed:
        return Section("Samples that are not learnt", [])
    by_key: dict[str, list[float]] = {}
    for _, losses in observed:
        for key, loss in losses.items():
            by_key.setdefault(key, []).append(loss)
    parts = [plot(_spread(by_key, observed[-1][0]), _SPREAD), _worst(by_key)]
    if found:
        parts.insert(0, words(found[-1].what[:1].upper() + found[-1].what[1:] + "."))
    return Section("Samples that are not learnt", parts)


_SPREAD = (
    "Losses of training samples, the last of each. Look for a second hill on the right: samples that the model does "
    "not learn while it learns the rest are often mislabelled."
)


def _spread(by_key: dict[str, list[float]], step: int) -> str:
    figure, axes = sheet(2.4)
    last = np.array([losses[-1] for losses in by_key.values()])
    some = np.log10(np.maximum(last[np.isfinite(last)], 1e-8))
    axes.hist(some, bins=60, color=SERIES[0], linewidth=0)
    axes.set(yscale="log", xlabel=f"log10 loss, by step {step}", ylabel="samples")
    if len(some) < len(last):
        axes.set_title(f"{len(last) - len(some)} losses are not finite", color=INK)
    return svg(figure, "losses of samples")


def _worst(by_key: dict[str, list[float]]) -> str:
    """The largest of the least loss that a sample has had in the second half of what was seen."""
    late = {key: losses[len(losses) // 2 :] for key, losses in by_key.items()}
    order = sorted(late, key=lambda key: (-min(late[key]), key))[:_SAMPLES]
    rows = [(key, f"{by_key[key][0]:.3g}", f"{min(late[key]):.3g}", f"{by_key[key][-1]:.3g}") for key in order]
    said = f"The {len(rows)} of {len(by_key)} samples whose loss stays highest"
    return table(("key", "first", "least in the second half", "last"), rows, said)
