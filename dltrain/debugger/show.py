"""A run's findings and how its layers went, on a terminal: ``dltrain debug show``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.reductions import Array
from dltrain.debugger.run import SavedRun, open_run
from dltrain.debugger.smdebug.run import ImportedRun

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 40


def show_run(url: str, rules: Sequence[str] | None) -> int:
    """Print findings, those of the run or of ``rules`` now, then gradients and updates by layer; returns 0."""
    from rich.console import Console  # slow to import

    run = open_run(url)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    found = run.findings() if rules is None else list(run.judge(rules or ["default"]))
    for each in found:
        _print(console, each)
    steps = run.steps()
    console.print(f"{len(found)} finding(s); statistics of {len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else
                  f"{len(found)} finding(s); no statistics yet")  # fmt: skip
    if steps:
        _tables(console, run)
    return 0


def _print(console: Any, finding: Finding) -> None:
    console.print(f"[bold]{finding.rule}[/bold] at step {finding.step}: {finding.what}")
    console.print(f"    {finding.why} {finding.advice}", style="dim")


def _tables(console: Any, run: SavedRun | ImportedRun) -> None:
    from rich.table import Table

    gradients = run.tensor_names(kind="gradients")
    if gradients:
        table = Table(
            "parameter", "gradient over time", "first", "last", title="mean |gradient|, each on its own scale"
        )
        for name in gradients:
            values = run.tensor(name).reductions("abs_mean")
            table.add_row(name.partition("/")[2], line_of(values), f"{values[0]:.2e}", f"{values[-1]:.2e}")
        console.print(table)
    updates = run.tensor_names(kind="updates")
    if updates:
        table = Table("parameter", "ratio over time", "median", title="mean |update| / mean |weight|")
        for name in updates:
            sizes = run.tensor(name.partition("/")[2]).reductions("abs_mean")
            with np.errstate(invalid="ignore"):
                values = run.tensor(name).reductions("abs_mean") / np.maximum(sizes, 1e-12)
            table.add_row(name.partition("/")[2], line_of(values), f"{np.median(values):.2e}")
        console.print(table)


def line_of(values: Array) -> str:
    """The values as bars on a logarithmic scale from the least to the largest; what is not finite is ``!``."""
    some = values[np.linspace(0, len(values) - 1, min(_WIDTH, len(values))).astype(int)]
    with np.errstate(divide="ignore"):
        logs = np.log10(np.abs(some))
    finite = logs[np.isfinite(logs)]
    if not len(finite):
        return "".join("!" if not np.isfinite(value) else _BARS[0] for value in some)
    low, high = finite.min(), finite.max()
    scaled = np.zeros(len(some)) if high == low else (logs - low) / (high - low)
    places = np.clip(np.nan_to_num(scaled, neginf=-1.0) * 7 + 1, 0, 8).astype(int)
    return "".join("!" if not np.isfinite(v) else _BARS[p] for v, p in zip(some, places, strict=True))
