"""What went on in the layers: gradients, updates beside weights, sizes of weights and activations, units that idle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dltrain.debugger.layers import Layers, layers_of, ratios
from dltrain.debugger.report.drawing import INK, QUIET, SERIES, heatmap, sheet, short, svg
from dltrain.debugger.report.page import Section, plot, table, words
from dltrain.debugger.run import SavedRun

MOST = 40
"""Rows of a heat map; models with more layers are shown by blocks."""

_NAMED = 5
"""Layers that stand out and are named."""

_NOTABLE = 1
"""Percent of dead or saturated units, below which a sentence will do."""

_LEAST_SPAN = 1.0
"""Of a scale of logarithms, so that small differences look small."""

HEALTHY = (1e-4, 1e-2)
"""Ratios of updates to weights that are usual; about 1e-3 is a rule of thumb."""


def gradient_flow(run: SavedRun) -> Section:
    """Mean sizes of gradients by layer and step."""
    layers = layers_of(run.segments(), "gradients")
    if not layers.names:
        return Section("Gradients", [])
    drawn = layers.grouped(MOST)
    values = drawn.reduced("abs_mean")
    picture = _heatmap(drawn, _log(values), "log10 mean |gradient|", "gradients by layer and step")
    said = "Look for rows as bright as their neighbours. Rows that darken from the last layer to the first vanish; "
    said += "ones that brighten explode. Grey cells are exactly 0, red ones NaN or infinite."
    return Section("Gradients", [*_told(layers, drawn), plot(picture, said), _standing_out(layers, "abs_mean")])


def update_ratios(run: SavedRun) -> Section:
    """Mean |update| / mean |weight| by layer, with the usual band."""
    updates, weights = layers_of(run.segments(), "updates"), layers_of(run.segments(), "weights")
    names, steps, values = ratios(weights, updates)
    if not names or not len(steps):
        return Section("Updates beside weights", [])
    parts = [plot(_ratio_lines(names, steps, values), _RATIOS)]
    blocks = weights.of(names).grouped(MOST)
    drawn, at, shown = ratios(blocks, updates.of(names).grouped(MOST))
    figure, axes = sheet(_height(drawn))
    centred = {"cmap": "RdBu_r", "vmin": -6, "vmax": 0}
    heatmap(figure, axes, drawn, at.tolist(), _log(shown), "log10 ratio", **centred)
    said = "The same by layer: pale is the usual size (about 1e-3), red is large, blue is small. Look for rows that "
    said += "differ from the others for long."
    parts += [*_told(updates.of(names), blocks), plot(svg(figure, "update to weight ratios by layer"), said)]
    return Section("Updates beside weights", parts)


_RATIOS = (
    "How far one step moves a weight, beside its size. Look for lines within the shaded band (1e-4 to 1e-2) after the "
    "first steps: above it steps undo what was learnt, far below it a layer hardly learns. The thick line is the "
    "median of all layers; layers that are furthest from it have colours, the others are grey. Ratios of 0, and those "
    "that are not finite, are left out of the lines, and grey and red in the map."
)


def _ratio_lines(names: Sequence[str], steps: Any, values: Any) -> str:
    figure, axes = sheet(3.4)
    axes.axhspan(*HEALTHY, color=SERIES[2], alpha=0.15, linewidth=0)
    logs = _log(values)
    finite = np.ma.masked_invalid(logs)
    middle = _medians(finite)
    far = _medians(np.ma.abs(finite - middle).T).filled(-1)
    outstanding = [int(place) for place in np.argsort(-far)[: min(4, len(names))] if far[place] > 0.5]
    rest = [place for place in range(len(names)) if place not in outstanding]
    if len(rest) > MOST:
        _range(axes, steps, finite[rest].filled(np.nan))
        rest = []
    for place in rest:
        axes.plot(steps, 10.0 ** finite[place], color=QUIET, alpha=0.45, linewidth=0.7)
    for colour, place in zip(SERIES, outstanding, strict=False):
        axes.plot(steps, 10.0 ** finite[place], color=colour, label=short(names[place]), linewidth=1.3)
    axes.plot(steps, 10.0**middle, color=INK, linewidth=2.2, label="median of all layers")
    axes.set(yscale="log", xlabel="step", ylabel="mean |update| / mean |weight|")
    if len(steps) > 1:
        axes.set_xlim(steps[0], steps[-1])
    axes.legend(fontsize=8)
    return svg(figure, "update to weight ratios over steps")


def _range(axes: Any, steps: Any, logs: Any) -> None:
    """The range that nine in ten layers lie in, and the range of all, instead of hundreds of lines."""
    known = np.isfinite(logs).any(0)
    for low, high, alpha in ((0, 100, 0.2), (5, 95, 0.35)):
        below, above = np.nanpercentile(logs[:, known], (low, high), axis=0)
        axes.fill_between(steps[known], 10**below, 10**above, color=QUIET, alpha=alpha, linewidth=0)


def _medians(values: Any) -> Any:
    """Of each column, over what is not masked."""
    return np.ma.median(values, axis=0)  # type: ignore[no-untyped-call]


def sizes(run: SavedRun, kind: str) -> Section:
    """Means and deviations by layer, at the first and the last due step, and deviations over steps."""
    title = kind.capitalize()
    layers = layers_of(run.segments(), kind)
    if not layers.names:
        return Section(title, [])
    drawn = layers.grouped(MOST)
    values = drawn.reduced("std")
    over_time = _heatmap(drawn, _log(values), "log10 deviation", f"deviations of {kind} by layer and step")
    profile = plot(_profile(drawn, kind), _PROFILE)
    return Section(title, [*_told(layers, drawn), profile, plot(over_time, _DEVIATIONS[kind])])


_PROFILE = (
    "Points are means, bars reach one standard deviation to both sides; grey at the first step, in colour at the last. "
    "Look for layers that are far from the others, or that moved far."
)
_DEVIATIONS = {
    "weights": "Look for rows that brighten without end: they grow until something overflows; decay holds them.",
    "activations": "Look for similar colours from layer to layer: signals that die out with depth darken, others grow.",
}


def _profile(layers: Layers, kind: str) -> str:
    figure, axes = sheet(_height(layers.names))
    means, deviations = layers.reduced("mean"), layers.reduced("std")
    places = np.arange(len(layers.names))
    for column, colour, shift, label in ((0, QUIET, -0.16, "first"), (-1, SERIES[0], 0.16, "last")):
        fine = np.isfinite(means[:, column].filled(np.nan)) & np.isfinite(deviations[:, column].filled(np.nan))
        if column == -1 and len(layers.steps) == 1:
            continue
        options = {"fmt": "o", "markersize": 3.2, "elinewidth": 1.6, "color": colour}
        text = f"{label} (step {layers.steps[column]})"
        text += "" if fine.all() else f", {int((~fine).sum())} of {len(fine)} are not finite"
        at, spread = means[fine, column].data, deviations[fine, column].data
        axes.errorbar(at, places[fine] + shift, xerr=spread, label=text, **options)
    axes.set_yticks(places, [short(name) for name in layers.names], fontsize=8)
    axes.set(ylim=(len(places) - 0.4, -0.6), xlabel=f"mean and deviation of {kind}")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return svg(figure, f"means and deviations of {kind} by layer")


def health(run: SavedRun) -> Section:
    """The share of units that are dead or saturated, by layer and step."""
    parts = []
    for kind, word, said in _IDLE:
        layers = layers_of(run.segments(), kind)
        if not layers.names:
            continue
        title = f"{word.capitalize()} units"
        drawn = _idle(layers)
        if not drawn.names:
            many = f"In none of {len(layers.names)} layers were {_NOTABLE} % of the units {word} at any due step."
            parts += [f"<h3>{title}</h3>", words(many)]
            continue
        shares = 100 * drawn.reduced("fraction_zero")
        figure, axes = sheet(_height(drawn.names))
        heatmap(figure, axes, drawn.names, drawn.steps.tolist(), shares, f"% {word}", vmin=0, vmax=100, cmap="OrRd")
        left_out = len(layers.names) - len(drawn.names)
        more = f" {left_out} of {len(layers.names)} layers, which have fewer of them, are left out." if left_out else ""
        parts.append(plot(svg(figure, f"{word} units by layer and step"), said + more, title))
    return Section("Units that do nothing", parts)


def _idle(layers: Layers) -> Layers:
    """Layers with a notable share at some step, those with the largest, in the model's order; all of a few layers."""
    most = 100 * layers.reduced("fraction_zero").max(1)
    if most.max() >= _NOTABLE and len(layers.names) <= MOST // 2:
        return layers
    notable = [int(place) for place in np.argsort(-most, kind="stable")[:MOST] if most[place] >= _NOTABLE]
    return layers.of([layers.names[place] for place in sorted(notable)])


_IDLE = (
    (
        "active",
        "dead",
        "A ReLU's unit counts as dead at a step if it is positive in less than 1 % of the samples looked at. Look for "
        "rows that darken and stay so: those units no longer learn.",
    ),
    (
        "unsaturated",
        "saturated",
        "A unit of tanh or sigmoid counts as saturated if its input lies where the function is flat. Look for rows "
        "that darken: no gradient passes there.",
    ),
)


def _heatmap(layers: Layers, values: Any, label: str, title: str) -> str:
    figure, axes = sheet(_height(layers.names))
    finite = values.compressed()
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    more = max(_LEAST_SPAN - (high - low), 0.0) / 2
    span = {"vmin": low - more, "vmax": high + more}
    heatmap(figure, axes, layers.names, layers.steps.tolist(), values, label, **span)
    return svg(figure, title)


def _height(names: Sequence[str]) -> float:
    return max(2.0, 1.1 + 0.19 * len(names))


def _log(values: Any) -> Any:
    """Logarithms to base 10; 0 becomes minus infinity, NaN stays, and masks are kept."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.ma.array(np.log10(values.data), mask=np.ma.getmaskarray(values))


def _told(layers: Layers, drawn: Layers) -> list[str]:
    """A sentence where tensors are shown together."""
    if len(layers.names) == len(drawn.names):
        return []
    many = f"{len(layers.names)} tensors are shown by blocks, in {len(drawn.names)} rows, each as if it were one."
    return [words(many, "muted")]


def _standing_out(layers: Layers, reduction: str) -> str:
    """Of many layers those with the least and the largest gradients at the end, in a table."""
    if len(layers.names) <= MOST:
        return ""
    values = layers.reduced(reduction)
    last = np.array([series.compressed()[-1] for series in values])
    order = np.argsort(np.where(np.isfinite(last), last, np.inf))
    chosen = [*order[:_NAMED], *order[-_NAMED:]]
    rows = [(layers.names[place], f"{values[place].compressed()[0]:.2e}", f"{last[place]:.2e}") for place in chosen]
    said = f"The {_NAMED} least and the {_NAMED} largest at the end, of {len(layers.names)}"
    return table(("tensor", "first", "last"), rows, said)
