"""How it learnt: loss, learning rate, gradient norm and scores, with the findings at their steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dltrain.debugger.reductions import Array
from dltrain.debugger.report.drawing import ALARM, MUTED, SERIES, line, logarithmic, sheet, svg
from dltrain.debugger.report.page import Section, plot
from dltrain.debugger.run import SavedRun
from dltrain.debugger.severity import Group

_APART = 0.02
"""Of the width of a plot: marks of one rule that are nearer become one."""

_NOT_SCORES = ("evaluation/samples", "evaluation/seconds")

_PANELS = 6


def learning(run: SavedRun, groups: Sequence[Group]) -> Section:
    """The plots of what every training shows."""
    steps, losses = run.scalars("loss")
    if not len(steps):
        return Section("How it learnt", [])
    parts = [_loss(run, steps, losses, groups), _rate_and_norm(run, groups)]
    return Section("How it learnt", [*parts, *_scores(run)])


def _loss(run: SavedRun, steps: Array, losses: Array, groups: Sequence[Group]) -> str:
    figure, axes = sheet(3.6)
    line(axes, steps, losses, "training, every step", SERIES[0])
    evaluations = [each for each in run.evaluations() if _is_finite(each.get("evaluation/loss"))]
    held_out = np.array([each["evaluation/loss"] for each in evaluations], dtype=np.float64)
    if len(held_out):
        at = [each["step"] for each in evaluations]
        axes.plot(at, held_out, "o-", color=SERIES[1], label="held-out", markersize=3.5)
    logarithmic(axes, losses, held_out)
    _not_finite(axes, steps, losses)
    mark(axes, groups)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    said = "Look for a curve that falls and then flattens, and for held-out losses that follow it: where they turn up "
    said += "while the training loss falls on, the model learns its samples by heart."
    said += " Numbered lines are findings, by their cards' numbers; short ones above, later findings." if groups else ""
    return plot(svg(figure, "training and held-out loss over steps"), said, "Loss")


def _rate_and_norm(run: SavedRun, groups: Sequence[Group]) -> str:
    figure, (above, below) = sheet(4.2, rows=2, sharex=True)
    steps, rates = run.scalars("learning_rate")
    line(above, steps, rates, "learning rate", SERIES[2])
    above.set(ylabel="learning rate", ylim=(0, None))
    norms, clips = run.scalars("norm")[1], run.scalars("clip")[1]
    line(below, steps, norms, "before clipping", SERIES[3])
    clipped = float(np.mean(clips < 1))
    if clipped:
        line(below, steps, norms * clips, "after clipping", SERIES[1])
        below.legend()
    logarithmic(below, norms)
    _not_finite(below, steps, norms)
    mark(below, groups)
    below.set(xlabel="step", ylabel="gradient norm")
    said = (
        "Look for norms that neither grow without end nor jump far above their neighbours; a jump with a rise of the "
    )
    said += "loss means steps that are too large. "
    said += f"{clipped:.0%} of the steps were clipped." if clipped else "No step was clipped."
    return plot(svg(figure, "learning rate and gradient norm over steps"), said, "Learning rate and gradient norm")


def _scores(run: SavedRun) -> list[str]:
    evaluations = run.evaluations()
    names = list(dict.fromkeys(name for each in evaluations for name in each if name.startswith("evaluation/")))
    names = [
        name for name in names if name not in _NOT_SCORES and any(_is_finite(each.get(name)) for each in evaluations)
    ]
    shown = names[:_PANELS]
    if not shown or len(evaluations) < 2:
        return []
    rows = -(-len(shown) // 3)
    figure, axes = sheet(1.9 * rows, rows=rows, columns=3, squeeze=False, sharex=True)
    for place, each in enumerate(axes.flat):
        if place >= len(shown):
            each.set_axis_off()
            continue
        known = [line for line in evaluations if _is_finite(line.get(shown[place]))]
        values = [line[shown[place]] for line in known]
        each.plot([line["step"] for line in known], values, "o-", markersize=3, color=SERIES[place % len(SERIES)])
        each.set_title(shown[place].removeprefix("evaluation/").replace("_", " "))
    for each in axes[-1]:
        each.set_xlabel("step")
    more = f" {len(names) - len(shown)} more stand in metrics.jsonl." if len(names) > len(shown) else ""
    said = "Look for scores that still get better at the end (train longer) or were better before (stop earlier, or "
    return [
        plot(svg(figure, "scores of evaluations over steps"), f"{said}regularise).{more}", "Scores on held-out data")
    ]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def mark(axes: Any, groups: Sequence[Group]) -> None:
    """A vertical line where each rule first found something, with the number of its card, and short ones where it did
    again; numbers that are too near to tell apart stand together."""
    low, high = axes.get_xlim()
    width = max(high - low, 1e-9) * _APART
    numbers: dict[int, list[int]] = {}
    for number, group in enumerate(groups, 1):
        colour = ALARM if group.level == "broken" else MUTED
        first, later = group.findings[0].step, [each.step for each in group.findings[1:]]
        axes.axvline(first, color=colour, linewidth=0.9, linestyle="--")
        for place in sorted({round((step - low) / width) for step in later}):
            axes.axvline(low + place * width, ymin=0.96, color=colour, linewidth=0.9)
        numbers.setdefault(round((first - low) / width), []).append(number)
    for place, some in numbers.items():
        text, at = ",".join(map(str, some)), low + place * width
        axes.annotate(text, (at, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axes.set_xlim(low, high)


def _not_finite(axes: Any, steps: Array, values: Array) -> None:
    """A red stretch along the bottom, where values are NaN or infinite."""
    wrong = ~np.isfinite(values)
    if not wrong.any():
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wrong, [False]]).astype(int)))
    for start, end in list(zip(edges[::2], edges[1::2], strict=True))[:200]:
        axes.axvspan(steps[start] - 0.5, steps[end - 1] + 0.5, ymax=0.04, color=ALARM, linewidth=0)
    if wrong.all():
        axes.set_xlim(steps[0], steps[-1] + 1)
    axes.plot([], [], color=ALARM, linewidth=5, label=f"not finite ({int(wrong.sum())} steps)")
    axes.legend()
