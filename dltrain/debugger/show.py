"""A run's findings and how its layers went, on a terminal: ``dltrain debug show``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dltrain.config import Length
from dltrain.debugger.layers import Layers, layers_of, ratios
from dltrain.debugger.reductions import Array
from dltrain.debugger.run import SavedRun, open_run
from dltrain.debugger.severity import Group, grouped
from dltrain.debugger.smdebug.run import ImportedRun
from dltrain.debugger.spent import Spent, brief, samples_of, summary_of, time_of
from dltrain.runtime.step_clock import PARTS

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 40

MOST = 24
"""Layers in a table; of more, those that stand out."""

_FINDINGS = 6
"""Of a rule; of more, the newest."""

_RANKS = 16

_DEAD = 0.01
"""Share of a layer's units below which nothing is said."""


def show_run(url: str, rules: Sequence[str] | None) -> int:
    """Print findings, those of the run or of ``rules`` now, then gradients, updates, units, time and the machine;
    returns 0."""
    run, console = open_run(url), terminal()
    found = run.findings() if rules is None else list(run.judge(rules or ["default"]))
    for group in grouped(found):
        _print_group(console, group)
    steps = run.steps()
    of = f"statistics of {len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else _why_none(run)
    console.print(f"{len(found)} finding(s); {of}")
    if isinstance(run, ImportedRun):
        _print_gradients(console, *_imported_gradients(run))
        return 0
    if steps:
        _print_layers(console, run)
        _print_idle(console, run)
    _print_time(console, run)
    _print_machine(console, run)
    return 0


def _why_none(run: SavedRun | ImportedRun) -> str:
    """Of a run without statistics: they were not asked for, or no step was due so far."""
    settings = {} if isinstance(run, ImportedRun) else run.record().get("config", {}).get("debugger", {})
    asked = not settings or Length.parse(settings["every"]) or settings["steps"] or settings["collections"]
    return "no statistics yet" if asked else "no statistics of tensors: the debugger was off (--debugger.every 50st)"


def terminal() -> Any:
    """A terminal as wide as it is; files and pipes get lines of 160 letters."""
    from rich.console import Console  # slow to import

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def _print_group(console: Any, group: Group) -> None:
    """The findings of one rule, the newest last; why, and what to try, once."""
    from rich.markup import escape  # slow to import

    left_out = len(group.findings) - _FINDINGS
    if left_out > 0:
        first = group.findings[0].step
        console.print(f"{group.rule}: {left_out} earlier finding(s), from step {first} on", style="dim")
    for each in group.findings[-_FINDINGS:]:
        console.print(f"[bold]{each.rule}[/bold] at step {each.step}: {escape(each.what)}", soft_wrap=True)
    last = group.findings[-1]
    console.print(escape(f"    {last.why} {last.advice}"), style="dim")


def _print_layers(console: Any, run: SavedRun) -> None:
    gradients = layers_of(run.segments(), "gradients")
    _print_gradients(console, gradients.names, [each.compressed() for each in gradients.reduced("abs_mean")])
    updates, weights = layers_of(run.segments(), "updates"), layers_of(run.segments(), "weights")
    names, _, values = ratios(weights, updates)
    if names:
        series = [each.compressed() for each in values]
        _print_table(console, "mean |update| / mean |weight|", "ratio", names, series)


def _imported_gradients(run: ImportedRun) -> tuple[list[str], list[Array]]:
    """Of those whose means were kept, or can be computed."""
    tensors = [run.tensor(name) for name in run.tensor_names(kind="gradients")]
    known = [tensor for tensor in tensors if tensor.can("abs_mean")]
    return [each.name.partition("/")[2] for each in known], [each.reductions("abs_mean") for each in known]


def _print_gradients(console: Any, names: Sequence[str], series: Sequence[Array]) -> None:
    if names:
        _print_table(console, "mean |gradient|, each on its own scale", "gradient", names, series)


def _print_table(console: Any, title: str, what: str, names: Sequence[str], series: Sequence[Array]) -> None:
    """The values of each layer as bars, with the first, the median and the last; layers in the model's order."""
    from rich.table import Table

    shown = standing_out(series, MOST)
    table = Table("parameter", f"{what} over time", "first", "median", "last", title=title)
    for place in shown:
        some = series[place]
        numbers = (some[0], np.median(some), some[-1]) if len(some) else (np.nan,) * 3
        table.add_row(names[place], line_of(some), *(f"{value:.2e}" for value in numbers))
    console.print(table)
    if len(shown) < len(names):
        console.print(f"  {len(names) - len(shown)} more of {len(names)} are nearer to the median of all", style="dim")


def standing_out(series: Sequence[Array], most: int) -> list[int]:
    """Places of at most so many series, in their order: those that are not finite at the end, and those whose last
    value is furthest, in orders of magnitude, from the median of all."""
    if len(series) <= most:
        return list(range(len(series)))
    last = np.array([each[-1] if len(each) else np.nan for each in series])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.abs(last))
    finite = logs[np.isfinite(logs)]
    middle = float(np.median(finite)) if len(finite) else 0.0
    far = np.where(np.isfinite(logs), np.abs(logs - middle), np.inf)
    return sorted(int(place) for place in np.argsort(-far, kind="stable")[:most])


def _print_idle(console: Any, run: SavedRun) -> None:
    """Layers with units that are dead or saturated."""
    for kind, word in (("active", "dead"), ("unsaturated", "saturated")):
        layers = layers_of(run.segments(), kind)
        if layers.names:
            console.print(_idle(layers, word), soft_wrap=True, markup=False)


def _idle(layers: Layers, word: str) -> str:
    shares = [each.compressed() for each in layers.reduced("fraction_zero")]
    last = np.array([each[-1] for each in shares])
    wrong = [int(place) for place in np.argsort(-last, kind="stable") if last[place] >= _DEAD]
    if not wrong:
        return f"{word} units: below {_DEAD:.0%} in each of {len(layers.names)} layers"
    named = [f"{layers.names[place]} {last[place]:.0%} (at first {shares[place][0]:.0%})" for place in wrong[:8]]
    more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return f"{word} units in {len(wrong)} of {len(layers.names)} layers: {', '.join(named)}{more}"


def _print_time(console: Any, run: SavedRun) -> None:
    """The parts of timed steps in percent, and of each rank where there are several."""
    spent = time_of(run.observations("timeline"))
    if spent is None:
        return
    said = [f"{part.replace('_', ' ')} {share:.0%}" for part, share in spent.shares().items()]
    milliseconds = 1e3 * float(np.median(spent.seconds.sum(2)))
    console.print(
        f"time of {len(spent.steps)} timed steps (median {milliseconds:.3g} ms): {', '.join(said)}", soft_wrap=True
    )
    if spent.seconds.shape[1] > 1:
        console.print(_ranks(spent))


def _ranks(spent: Spent) -> Any:
    from rich.table import Table

    parts = list(spent.shares())
    table = Table("rank", "ms", *(part.replace("_", " ") for part in parts), title="percent of each rank's time")
    means = spent.seconds.mean(0)
    slow = sorted(np.argsort(-means.sum(1), kind="stable")[:_RANKS].tolist())
    for rank in slow:
        whole = max(float(means[rank].sum()), 1e-12)
        shares = (f"{100 * means[rank, PARTS.index(part)] / whole:.0f}" for part in parts)
        table.add_row(str(rank), f"{1e3 * whole:.3g}", *shares)
    if len(slow) < len(means):
        table.caption = f"{len(means) - len(slow)} ranks that take less are left out"
    return table


def _print_machine(console: Any, run: SavedRun) -> None:
    system = run.observations("system")
    if samples_of(system):
        said = brief(summary_of(system), ("gpu", "gpu_memory", "cpu", "core", "memory"))
        console.print(f"machine: {said}", soft_wrap=True)


def line_of(values: Array) -> str:
    """The values as bars on a logarithmic scale from the least to the largest; what is not finite is ``!``."""
    if not len(values):
        return ""
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
