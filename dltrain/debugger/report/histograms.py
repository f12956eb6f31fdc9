"""How values of some tensors are spread over time, by the quantiles of their histograms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.report.drawing import SERIES, sheet, short, svg
from dltrain.debugger.report.page import Section, plot, words
from dltrain.debugger.run import SavedRun
from dltrain.debugger.seen import kind_of

_MOST = 9

_BANDS = ((0.01, 0.99, 0.15), (0.1, 0.9, 0.22), (0.25, 0.75, 0.35))
"""Shares between which a band lies, and how strong its colour is."""

_POINTS = 120


def spread(run: SavedRun, findings: Iterable[Finding]) -> Section:
    """Bands of quantiles: of tensors that findings name, and of the first, middle and last of each kind."""
    known = list(dict.fromkeys(name for some in run.histograms().values() for name in some))
    if not known:
        return Section("How values are spread", [])
    chosen = _chosen(known, findings)
    rows = -(-len(chosen) // 3)
    figure, axes = sheet(2.1 * rows, rows=rows, columns=3, squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.set_axis_off()
    for name, axis in zip(chosen, axes.flat, strict=False):
        _bands(run, name, axis)
    said = "The line is the median; bands hold 50, 80 and 98 % of the values. Look for bands that narrow to 0, widen "
    said += "without end, or lie to one side. Quantiles are of bins, within a quarter of the value."
    told = words(f"{len(chosen)} of {len(known)} tensors that there are histograms of.", "muted")
    return Section("How values are spread", [told, plot(svg(figure, "quantiles of tensors over steps"), said)])


def _bands(run: SavedRun, name: str, axis: Any) -> None:
    tensor = run.tensor(name)
    steps = list(tensor.counts)
    places = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int))
    colour = {"gradients": SERIES[3], "updates": SERIES[1]}.get(kind_of(name), SERIES[0])
    at = np.array(steps)[places]
    for low, high, alpha in _BANDS:
        below, above = tensor.quantiles(low)[places], tensor.quantiles(high)[places]
        axis.fill_between(at, below, above, color=colour, alpha=alpha, linewidth=0)
    axis.plot(at, tensor.quantiles(0.5)[places], color=colour)
    axis.set_title(short(name), fontsize=8.5)


def _chosen(known: list[str], findings: Iterable[Finding]) -> list[str]:
    named = [name for each in findings for name in each.where if name in known][:3]
    kinds: dict[str, list[str]] = {}
    for name in known:
        if not name.endswith("bias"):
            kinds.setdefault(kind_of(name), []).append(name)
    order = [kind for kind in ("weights", "gradients", "activations", "updates") if kind in kinds]
    for kind in [*order, *(kind for kind in kinds if kind not in order)]:
        some = kinds[kind]
        named += [some[0], some[len(some) // 2], some[-1]]
    return list(dict.fromkeys(named))[:_MOST]
