"""Putting a report together: ``dltrain debug report RUN``."""

from __future__ import annotations

from dltrain import storage
from dltrain.debugger.report.drawing import style
from dltrain.debugger.report.facts import ended, subtitle, watching, what_was_trained
from dltrain.debugger.report.histograms import spread
from dltrain.debugger.report.layers import gradient_flow, health, sizes, update_ratios
from dltrain.debugger.report.learning import learning
from dltrain.debugger.report.machine import machine
from dltrain.debugger.report.page import Section, page
from dltrain.debugger.report.samples import confusion, hard_samples
from dltrain.debugger.report.timing import timing
from dltrain.debugger.report.verdict import cards, verdict_html
from dltrain.debugger.run import SavedRun, open_run
from dltrain.debugger.severity import by_gravity, grouped
from dltrain.debugger.smdebug.run import ImportedRun
from dltrain.errors import UserError


def write_report(url: str, output: str = "") -> str:
    """Write the report of a run to ``output``, or beside what the debugger wrote; returns where it is.

    Raises :class:`UserError` where there are no statistics, or it cannot be written.
    """
    run = open_run(url)
    if isinstance(run, ImportedRun):
        raise UserError(f"{url} is a SageMaker Debugger trial, of which there is no report; use dltrain debug show")
    target = output or storage.join(url, "debugger/report.html")
    try:
        storage.write(target, report(run).encode())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; name a file with --output") from None
    return target


def report(run: SavedRun) -> str:
    """The page of a run, finished or not."""
    record = run.record()
    findings = run.findings()
    groups = by_gravity(grouped(findings))
    head = verdict_html(groups, watching(record), ended(run, record))
    with style():
        sections = [
            what_was_trained(run, record),
            Section("Findings", cards(groups)),
            learning(run, groups),
            gradient_flow(run),
            update_ratios(run),
            health(run),
            sizes(run, "weights"),
            sizes(run, "activations"),
            spread(run, findings),
            timing(run),
            machine(run),
            confusion(run),
            hard_samples(run),
        ]
    return page(f"Report of {_name(run.url)}", subtitle(run, record), head, sections)


def _name(url: str) -> str:
    """The last part of a folder or URL."""
    return url.rstrip("/").rpartition("/")[2] or url
