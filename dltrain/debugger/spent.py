"""Where the time of timed steps went, and what the machine did meanwhile, as arrays of a saved run's observations.

time = time_of(run.observations("timeline"))
time.shares()  # {"forward": 0.31, "backward": 0.52, ...}: of all timed steps and ranks, the largest first
summary_of(run.observations("system"))["cpu"]["p95"]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.machine import OverallSystemUsage, summed_up
from dltrain.debugger.seen import Seen
from dltrain.runtime.step_clock import PARTS

PERCENTILES = ("mean", "p50", "p95", "p99")

Observations = Sequence[tuple[int, Any]]

UNITS = {
    "cpu": "%", "core": "%", "io_wait": "%", "memory": "%", "gpu": "%", "gpu_memory": "%",
    "read": "MB/s", "written": "MB/s", "sent": "MB/s", "received": "MB/s",
}  # fmt: skip
"""Of what is seen of the machine; bytes per second are shown by the million."""


class Spent(NamedTuple):
    """Seconds of timed ``steps``, float64 [steps, ranks, parts], parts as :data:`PARTS`; ``bubble`` is the share of a
    pipeline's schedule in which ranks wait, or ``None``."""

    steps: list[int]
    seconds: Array
    bubble: float | None

    def shares(self) -> dict[str, float]:
        """Of the whole time by part, the largest first; parts that took none are left out."""
        sums = self.seconds.sum((0, 1))
        found = {part: float(value / sums.sum()) for part, value in zip(PARTS, sums, strict=True) if value > 0}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Mean, median, 95th and 99th percentiles of the seconds of a step by part, means over ranks."""
        means = self.seconds.mean(1)
        return {part: summed_up(means[:, PARTS.index(part)]) for part in self.shares()}


def time_of(timelines: Observations) -> Spent | None:
    """The parts of timed steps; ``None`` where none were timed. Of a run that went on with other ranks, those of the
    last ones."""
    if not timelines:
        return None
    ranks = len(timelines[-1][1]["seconds"][PARTS[0]])
    kept = [value for _, value in timelines if len(value["seconds"][PARTS[0]]) == ranks]
    seconds = np.array([[value["seconds"].get(part, [0.0] * ranks) for part in PARTS] for value in kept])
    if not seconds.any():
        return None
    return Spent([value["of"] for value in kept], seconds.swapaxes(1, 2), kept[-1].get("bubble"))


def samples_of(system: Observations) -> list[dict[str, Any]]:
    """All samples of the machine, oldest first."""
    return [sample for _, some in system for sample in some]


def summary_of(system: Observations) -> dict[str, dict[str, float]]:
    """Mean and percentiles of what the machine did, in :data:`UNITS`; empty where nothing was seen."""
    rule = OverallSystemUsage()
    for step, samples in system:
        rule.update(Seen(step, observed={"system": samples}))
    return {name: _scaled(values, UNITS[name]) for name, values in rule.report().items()}


def _scaled(values: dict[str, float], unit: str) -> dict[str, float]:
    return {name: value / 1e6 if unit == "MB/s" else value for name, value in values.items()}


def brief(summary: dict[str, dict[str, float]], names: Iterable[str]) -> str:
    """Medians in a line, with the 95th percentiles, such as "cpu 41 (95th percentile 88) %"."""
    shown = [(name.replace("_", " "), summary[name], UNITS[name]) for name in names if name in summary]
    return ", ".join(f"{name} {of['p50']:.3g} (95th percentile {of['p95']:.3g}) {unit}" for name, of, unit in shown)
