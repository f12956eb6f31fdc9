"""The page that shows the stored results, made from them alone: ``python -m benchmarks report``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import data_report
from benchmarks.result import Request
from dltrain.errors import UserError

HEAD = """# Results

Made from the JSON files beside it by `python -m benchmarks report`; change nothing here. Each file holds the command,
the settings, the versions and every round's raw seconds.
"""

THROUGHPUT = """
## Throughput

Training images per second, medians over interleaved rounds in one process. The ratio ours / bare is the median of the
ratios of neighbouring rounds; in brackets their quartiles.

| model | batch | pixels | ours, images/s | bare PyTorch, images/s | ratio | hardware | torch | result |
|---|---|---|---|---|---|---|---|---|
"""

OVERHEAD = """
## Trainer overhead

Microseconds added to a step of a small model by the Trainer, median over interleaved rounds; in brackets the quartiles.

| figure | added, µs per step | bare step, µs | hardware | torch | result |
|---|---|---|---|---|---|
"""

PARALLEL = """
## Layouts

CPU time that a layout takes beyond the same layout written by hand in plain PyTorch, of all ranks together: the median
of the ratios within rounds, both loops in the same processes, in turn; in brackets the quartiles.
[docs/parity.md](../../docs/parity.md) shows that layouts give the numbers of one process.

| layout | beyond plain PyTorch | plain PyTorch, CPU ms per step | hardware | torch | result |
|---|---|---|---|---|---|
"""

DEBUGGER = """
## The debugger

What default statistics and default rules cost of a step of ResNet-18 at batch 64, on due steps, and spread over fifty
steps of which one is due; in brackets the quartiles. Off-steps are those of a small model, in microseconds.

| images | every step due | every fiftieth | off-step, µs | hardware | torch | result |
|---|---|---|---|---|---|---|
"""

SMDEBUG = """
## Statistics beside SageMaker Debugger

CPU time that a due step takes more with statistics of 50 parameters and their gradients: smdebug asked for so many
numbers, dltrain taking all of its statistics and judging them by its default rules. Medians over passes that alternate
between the two; in brackets the quartiles of the ratios within passes.

| smdebug is asked for | dltrain, ms | smdebug, ms | smdebug / dltrain | hardware | torch | result |
|---|---|---|---|---|---|---|
"""

PARITY = """
## Parity

Layouts with the losses, norms and gradients of one process; [docs/parity.md](../../docs/parity.md) lists them.

| the same | of | hardware | torch | result |
|---|---|---|---|---|
"""

DATA = """
## Data

Each contestant runs in a process of its own with one thread, on the same files and a warm page cache. Figures are
medians over interleaved rounds, in brackets their quartiles. A ratio says how many times as good ours is: the median of
the ratios within rounds.
"""

FIGURES = {
    "trainer": "Trainer, no hooks",
    "records_hook": "with the hook that writes metrics.jsonl",
    "clipping": "no hooks, clipping in both loops",
}


def run(request: Request) -> dict[str, Any]:
    """Write README.md into the folder of results; raises :class:`UserError` when there is no result."""
    paths = sorted(request.output.glob("*.json"))
    if not paths:
        raise UserError(f"{request.output.name}/ holds no result; run a benchmark first")
    page = request.output / "README.md"
    results = [(path.name, _read(path)) for path in paths]
    for name, result in results:
        if result["benchmark"] == "data":
            data_report.draw(result, request.output / data_report.picture(name))
    page.write_text(render(results))
    return {"benchmark": "report", "results": len(paths), "page": f"{request.output.name}/{page.name}"}


def render(results: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """The page, from the results by file name."""
    heads = {"data": DATA, "throughput": THROUGHPUT, "trainer_overhead": OVERHEAD}
    heads |= {"parallel": PARALLEL, "debugger": DEBUGGER, "smdebug": SMDEBUG, "parity": PARITY}
    rows: dict[str, list[str]] = {kind: [] for kind in heads}
    for name, result in results:
        if result["benchmark"] == "throughput":
            rows["throughput"] += [_throughput(name, result, model) for model in result["models"]]
        elif result["benchmark"] == "trainer_overhead":
            rows["trainer_overhead"] += [_overhead(name, result, figure) for figure in result["figures"]]
        elif result["benchmark"] == "parallel":
            rows["parallel"] += [_layout(name, result, layout) for layout in result["figures"]]
        elif result["benchmark"] == "parity":
            same = sum(bool(case["same"]) for case in result["cases"])
            rows["parity"].append(_row(same, len(result["cases"]), *_origin(name, result)))
        elif result["benchmark"] == "debugger":
            sizes = [figure for figure in result["figures"] if figure != "off_step_microseconds"]
            rows["debugger"] += [_watched(name, result, size) for size in sizes]
        elif result["benchmark"] == "smdebug":
            rows["smdebug"] += [_beside_smdebug(name, result, each) for each in result["figures"]]
        elif result["benchmark"] == "data":
            rows["data"].append(data_report.section(name, result, _origin(name, result)))
    return HEAD + "".join(heads[kind] + "".join(lines) for kind, lines in rows.items() if lines)


def _throughput(name: str, result: dict[str, Any], model: str) -> str:
    measured = result["models"][model]
    by_round = measured["ratio_by_round"]
    half = f"{by_round['lower_quartile']:.3f} to {by_round['upper_quartile']:.3f}"
    return _row(
        model,
        measured["batch"],
        measured["pixels"],
        f"{measured['ours_images_per_second']:.1f}",
        f"{measured['bare_images_per_second']:.1f}",
        f"{measured['ratio']:.3f} ({half}){_busy(measured)}",
        *_origin(name, result),
    )


def _overhead(name: str, result: dict[str, Any], figure: str) -> str:
    measured = result["figures"][figure]
    added, bare = measured["microseconds_added"], measured["bare_microseconds"]
    return _row(
        FIGURES.get(figure, figure),
        f"{added['median']:.0f} ({added['lower_quartile']:.0f} to {added['upper_quartile']:.0f}){_busy(measured)}",
        f"{bare['median']:.0f}",
        *_origin(name, result),
    )


def _layout(name: str, result: dict[str, Any], layout: str) -> str:
    measured = result["figures"][layout]
    ratio, bare = measured["ratio"], measured["bare_cpu_seconds"]
    median, lower, upper = (f"{ratio[key] - 1:+.1%}" for key in ("median", "lower_quartile", "upper_quartile"))
    beyond = f"{median} ({lower} to {upper}){_busy(measured)}"
    return _row(layout, beyond, f"{bare['median'] * 1e3:.0f}", *_origin(name, result))


def _watched(name: str, result: dict[str, Any], size: str) -> str:
    figures = result["figures"]
    every, off = figures[size]["every_step_percent"], figures["off_step_microseconds"]
    cost = f"{every['median']:.2f} % ({every['lower_quartile']:.2f} to {every['upper_quartile']:.2f})"
    return _row(
        size, cost, f"{figures[size]['interval_50_percent']:.2f} %", f"{off['median']:.1f}", *_origin(name, result)
    )


def _beside_smdebug(name: str, result: dict[str, Any], figure: str) -> str:
    measured = result["figures"][figure]
    ours, theirs, ratio = (measured[key] for key in ("dltrain_ms", "smdebug_ms", "ratio"))
    half = f"{ratio['lower_quartile']:.1f} to {ratio['upper_quartile']:.1f}"
    times = f"{ratio['median']:.1f} ({half}){_busy(measured)}"
    return _row(figure, f"{ours['median']:.2f}", f"{theirs['median']:.1f}", times, *_origin(name, result))


def _origin(name: str, result: dict[str, Any]) -> tuple[str, str, str]:
    hardware = result["hardware"]
    machine = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    return machine, result["versions"]["torch"], f"[{result['date'][:10]}{_quick(result)}]({name})"


def _quick(result: dict[str, Any]) -> str:
    return ", quick" if result["settings"]["quick"] else ""


def _busy(measured: dict[str, Any]) -> str:
    return "" if measured["steady"] else ", unsteady machine"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name} is not a result: {error}; delete it or restore it") from None
    return result
