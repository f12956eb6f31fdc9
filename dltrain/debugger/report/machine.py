"""What the machine did meanwhile: CPU, memory, disks, network and GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np

from dltrain.debugger.report.drawing import SERIES, line, sheet, svg
from dltrain.debugger.report.page import Section, plot, table
from dltrain.debugger.run import SavedRun
from dltrain.debugger.spent import PERCENTILES, UNITS, samples_of, summary_of

_NAMES = {
    "cpu": "CPU, mean of cores",
    "core": "CPU, busiest core",
    "io_wait": "CPU, waiting for disks",
    "memory": "memory",
    "read": "read from disks",
    "written": "written to disks",
    "sent": "sent",
    "received": "received",
    "gpu": "GPUs",
    "gpu_memory": "memory of GPUs",
}

_GPUS = 8

_POINTS = 150
"""Of a line."""

_NAMED = 4
"""Lines of a plot that are named."""

_SECONDS = 180
"""Up to which time is given in seconds."""

_FEW = 4
"""Samples of which a plot says nothing yet."""


def machine(run: SavedRun) -> Section:
    """Its use over time, and percentiles."""
    system = run.observations("system")
    samples = samples_of(system)
    if not samples:
        return Section("The machine", [])
    over_time = [plot(_over_time(samples), _SAID[bool(samples[-1]["gpus"])])] if len(samples) >= _FEW else []
    return Section("The machine", [*over_time, _percentiles(summary_of(system))])


_SAID = (
    "Look for what is at its limit: a core at 100 %, disks, the network. Memory that grows without end runs out.",
    "Look for GPUs that are busy all the time; where they are not, for what is at its limit instead: a core at 100 %, "
    "disks, the network. Memory that grows without end runs out.",
)
"""Without GPUs, and with them."""


def _over_time(samples: list[dict[str, Any]]) -> str:
    times = np.array([each["time"] for each in samples])
    unit = "minutes" if times[-1] - times[0] > _SECONDS else "seconds"
    times = (times - times[0]) / (60 if unit == "minutes" else 1)
    gpus = min(_GPUS, *(len(each["gpus"]) for each in samples))
    panels: list[tuple[str, list[tuple[str, Any]]]] = [
        ("% of CPU and memory", [(_NAMES[name], _of(samples, name)) for name in ("cpu", "core", "memory")]),
        ("disks, MB/s", [(_NAMES[name], _of(samples, name) / 1e6) for name in ("read", "written")]),
        ("network, MB/s", [(_NAMES[name], _of(samples, name) / 1e6) for name in ("sent", "received")]),
    ]
    for name, title in (("used", "% of GPUs"), ("memory", "% of GPU memory")):
        some = [(f"GPU {gpu}", np.array([each["gpus"][gpu][name] for each in samples])) for gpu in range(gpus)]
        count = f" ({gpus})" if gpus > 1 else ""
        panels += [(title + count, some)] if some else []
    rows = -(-len(panels) // 2)
    figure, axes = sheet(2.1 * rows, rows=rows, columns=2, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for (title, some), axis in zip(panels, axes.flat, strict=False):
        for (label, values), colour in zip(some, SERIES, strict=False):
            line(axis, times, values, label, colour, _POINTS)
        axis.set(title=title, xlabel=unit, ylim=(0, 103 if title.startswith("%") else None))
        if len(some) <= _NAMED:
            axis.legend(fontsize=7)
    return svg(figure, "use of the machine over time")


def _of(samples: list[dict[str, Any]], name: str) -> Any:
    return np.array([each[name] for each in samples], dtype=np.float64)


def _percentiles(summary: dict[str, dict[str, float]]) -> str:
    rows = [
        (_NAMES[name], UNITS[name], *(f"{values[each]:.3g}" for each in PERCENTILES))
        for name, values in summary.items()
    ]
    head = ("", "unit", "mean", "median", "95th", "99th")
    return table(head, rows, "Percentiles over all samples, of the first host")
