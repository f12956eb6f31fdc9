"""How plots are drawn: SVG whose ink is the page's own, so that they read in the light, in the dark and printed.

    figure, axes = sheet(height=3.0)
    axes.plot(steps, values, color=SERIES[0])
    text = svg(figure, "loss over steps")

Lines are thinned and heat maps are pictures within the SVG, so that a plot stays small however long the run was.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dltrain.debugger.reductions import Array

INK, MUTED, GRID = "#101112", "#202122", "#303132"
"""Stand for the page's colours, which take their places in the SVG."""

SERIES = ("#3b7dd8", "#d9822b", "#3a9a5b", "#8b63c7", "#c74f86", "#2a9d9d", "#a0744a", "#8a8f98", "#b5a12f")
"""Lines and areas, in their order; to be told apart on white and on black."""

ALARM, QUIET = "#d64545", "#8a8f98"

POINTS = 500
"""Of a line; of more, each is the mean of several."""

COLUMNS = 300
"""Of a heat map."""

_WIDTH = 9.2
_PAGE = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dltrain",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.formatter.limits": (-3, 5),
}


@contextmanager
def style() -> Iterator[None]:
    """Within it, what is drawn looks like the rest of the page."""
    with matplotlib.rc_context(_STYLE):
        yield


def sheet(height: float, rows: int = 1, columns: int = 1, width: float = _WIDTH, **options: Any) -> tuple[Figure, Any]:
    """A figure ``height`` inches high and by default as wide as the page, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page; ``title`` is read to those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=150, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    share = figure.get_size_inches()[0] / _WIDTH
    for stands_for, colour in _PAGE.items():
        text = text.replace(stands_for, colour)
    label = html.escape(title, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" style="width: {share:.0%}" ', 1)


def thinned(steps: Array, values: Array, most: int = POINTS) -> tuple[Array, Array, Array, Array]:
    """Steps, and means, least and largest of neighbouring values, at most so many; what is not finite stays so."""
    if len(steps) <= most:
        return steps, values, values, values
    ends = np.linspace(0, len(steps), most + 1).astype(int)[:-1]
    counts = np.diff([*ends, len(steps)])
    with np.errstate(invalid="ignore"):
        return (
            np.add.reduceat(steps, ends) / counts,
            np.add.reduceat(values, ends) / counts,
            np.minimum.reduceat(values, ends),
            np.maximum.reduceat(values, ends),
        )


def line(axes: Any, steps: Array, values: Array, label: str, colour: str, most: int = POINTS) -> None:
    """A line of a series over steps, and around it, where it was thinned, the range that it lies in."""
    at, mean, low, high = thinned(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64), most)
    axes.plot(at, mean, color=colour, label=label)
    if len(at) < len(steps):
        axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)


def logarithmic(axes: Any, *values: Array) -> None:
    """A logarithmic scale where the positive values span more than a factor of 20."""
    every = np.concatenate([np.ravel(some) for some in values])
    some = every[np.isfinite(every) & (every > 0)]
    if len(some) and some.max() > 20 * some.min():
        axes.set_yscale("log")


def on_a_grid(steps: Sequence[int], values: Any) -> tuple[tuple[float, float], Any]:
    """First and last step, and masked values [layers, columns] at evenly spaced steps, each as it was at or last
    before that step."""
    known_at = np.asarray(steps, dtype=np.float64)
    first, last = float(known_at[0]), float(known_at[-1])
    columns = min(COLUMNS, int(last - first) + 1)
    at = np.linspace(first, last, columns) + 1e-6
    found = np.ma.array(np.zeros((len(values), columns)), mask=True)
    for row, (series, there) in enumerate(zip(values.data, ~np.ma.getmaskarray(values), strict=True)):
        places = np.searchsorted(known_at[there], at, side="right") - 1
        known = places >= 0
        found[row, known] = series[there][places[known]]
    return (first, last), found


def heatmap(
    figure: Figure, axes: Any, names: Sequence[str], steps: Sequence[int], values: Any, label: str, **options: Any
) -> None:
    """Masked values [layers, steps] as colours, layers from top to bottom, steps from left to right.

    NaN and infinity are red, minus infinity (a logarithm of 0) is grey, and what is masked is left out.
    """
    (first, last), grid = on_a_grid(steps, values)
    mask = np.ma.getmaskarray(grid)
    extent = (first - 0.5, last + 0.5, len(names) - 0.5, -0.5)
    finite = np.isfinite(grid.data) & ~mask
    usual = {"aspect": "auto", "interpolation": "none", "extent": extent}
    colours = {"cmap": options.pop("cmap", "viridis"), **options}
    image = axes.imshow(np.ma.array(grid.data, mask=~finite), **usual, **colours)
    for wrong, colour in ((np.isneginf(grid.data), QUIET), (~finite & ~np.isneginf(grid.data), ALARM)):
        if (wrong & ~mask).any():
            cells = np.zeros((*mask.shape, 4))
            cells[wrong & ~mask] = matplotlib.colors.to_rgba(colour)
            axes.imshow(cells, **usual)
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8 if len(names) <= 30 else 7)
    axes.set_xlabel("step")
    axes.grid(False)
    if finite.any():
        figure.colorbar(image, ax=axes, pad=0.01, aspect=30, label=label).outline.set_visible(False)


def short(name: str, most: int = 34) -> str:
    """A long name without its middle, as matplotlib shows it: dollars would begin a formula."""
    kept = name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"
    return kept.replace("$", r"\$")
