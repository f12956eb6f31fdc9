"""Where the time went: the parts of timed steps, rank beside rank, and how much of the hardware was used."""

from __future__ import annotations

from typing import Any

import numpy as np

from dltrain.debugger.report.drawing import SERIES, sheet, svg
from dltrain.debugger.report.page import Section, pairs, plot, table, words
from dltrain.debugger.run import SavedRun
from dltrain.debugger.spent import PERCENTILES, Spent, time_of
from dltrain.runtime.step_clock import PARTS

_BARS = 120
"""Of timed steps; of more, some are shown, evenly apart."""

_SPEED = {
    "samples_per_second": ("samples per second", "{:,.0f}"),
    "step_seconds": ("seconds of a step", "{:.4g}"),
    "data_wait": ("share of the time that steps wait for data", "{:.1%}"),
    "tflops": ("TFLOPs per second of each rank", "{:.3g}"),
    "mfu": ("model FLOPs utilisation (MFU), of the devices' peak", "{:.1%}"),
}
"""What is logged of it, how that is called, and how it is written."""

_COLOUR = dict(zip(PARTS, SERIES, strict=True))


def timing(run: SavedRun) -> Section:
    """Parts over steps, in percent, and by rank."""
    spent = time_of(run.observations("timeline"))
    parts = [] if spent is None else [_over_steps(spent), _percentages(spent)]
    if spent is not None and spent.seconds.shape[1] > 1:
        parts.insert(1, _by_rank(spent))
    parts += filter(None, [_speed(run)])
    waited = run.observations("initialization")
    if waited:
        parts.append(words(f"The first step came {waited[-1][1]:.3g} s after the process had started.", "muted"))
    return Section("Where the time went", parts)


def _over_steps(spent: Spent) -> str:
    chosen = np.unique(np.linspace(0, len(spent.steps) - 1, _BARS).astype(int))
    seconds, steps = 1e3 * spent.seconds.mean(1)[chosen], np.array(spent.steps)[chosen]
    figure, axes = sheet(3.2)
    bottom, widths = np.zeros(len(chosen)), _widths(steps)
    for part in spent.shares():
        values = seconds[:, PARTS.index(part)]
        axes.bar(steps, values, widths, bottom, color=_COLOUR[part], label=_said(part), linewidth=0)
        bottom += values
    usual = np.percentile(bottom, 95)
    if bottom.max() > 4 * usual:
        axes.set_ylim(0, 1.5 * usual)
    axes.set(xlabel="step", ylabel="milliseconds")
    figure.legend(loc="outside upper center", ncols=min(5, len(spent.shares())), fontsize=8)
    said = f"Each bar is one timed step ({len(spent.steps)} were timed), mean over ranks. Look for parts that are not "
    said += (
        "forward or backward and take much (data wait: the loader is slow; communication: the network), and for bars "
    )
    said += "far above the others."
    said += " Bars that are cut off above stand in the table's percentiles." if bottom.max() > 4 * usual else ""
    return plot(svg(figure, "parts of timed steps"), said)


def _widths(steps: Any) -> Any:
    """Bars as wide as they are apart, but not wider than the usual gap."""
    if len(steps) < 2:
        return np.ones(len(steps))
    gaps = np.diff(steps)
    return np.minimum(np.append(gaps, gaps[-1]), np.median(gaps)) * 0.86


def _by_rank(spent: Spent) -> str:
    means = 1e3 * spent.seconds.mean(0)
    ranks = np.arange(len(means))
    figure, axes = sheet(min(1.3 + 0.24 * len(ranks), 9.0))
    left = np.zeros(len(ranks))
    for part in spent.shares():
        values = means[:, PARTS.index(part)]
        axes.barh(ranks, values, 0.75, left, color=_COLOUR[part], label=_said(part), linewidth=0)
        left += values
    axes.set(xlabel="milliseconds of a step, mean over timed steps", ylabel="rank", ylim=(len(ranks) - 0.5, -0.5))
    axes.set_yticks(ranks if len(ranks) <= 32 else ranks[:: -(-len(ranks) // 32)])
    figure.legend(loc="outside upper center", ncols=min(5, len(spent.shares())), fontsize=8)
    said = "Look for a rank whose forward, backward or data wait is longer than the others': they wait for it, "
    return plot(svg(figure, "parts of steps by rank"), said + "which shows as their communication.", "Rank by rank")


def _percentages(spent: Spent) -> str:
    percentiles = spent.percentiles()
    rows = [
        (
            _said(part),
            f"{share:.1%}",
            *(f"{1e3 * percentiles[part][name]:.2f}" for name in PERCENTILES),
        )
        for part, share in spent.shares().items()
    ]
    head = ("part", "share", "mean ms", "median", "95th", "99th")
    told = table(head, rows, "Parts of timed steps, mean over ranks; percentiles are over steps")
    if spent.bubble:
        told += words(f"A pipeline with this schedule waits for {spent.bubble:.1%} of its time at least.")
    return told


def _speed(run: SavedRun) -> str:
    """Medians of what was logged of speed, such as how much of the devices' peak was used."""
    logged = [line for line in run.metrics() if line.get("kind") == "step"]
    found = {}
    for name, (title, form) in _SPEED.items():
        values = [float(line[name]) for line in logged if isinstance(line.get(name), (int, float))]
        if values:
            found[title] = form.format(float(np.median(values)))
    return "<h3>Speed</h3>" + pairs(found) if found else ""


def _said(part: str) -> str:
    return part.replace("_", " ")
