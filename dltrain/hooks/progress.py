"""The run as one watches it: a live line on a terminal, plain lines elsewhere; rank 0 alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dltrain.hooks.base import Hook, View
from dltrain.hooks.printed import evaluation_line, step_line


class PlainProgress(Hook):
    """A line per evaluation and checkpoint, and per logged step at most every ``seconds``."""

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._last = 0.0

    def fit_start(self, trainer: View) -> None:
        if trainer.step:
            self._print(f"resumed at step {trainer.step} of {_total(trainer)}")

    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        import time

        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._print(step_line(record, _total(trainer)))

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> None:
        self._print(evaluation_line(record))

    def stop_requested(self, trainer: View, reason: str) -> None:
        self._print(f"stopping at step {trainer.step} ({reason}); saving")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class RichProgress(Hook):
    """A progress bar with loss, rate and time left; evaluations stay above it."""

    def __init__(self, console: Console | None = None) -> None:
        columns = (
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
        )
        self._progress = Progress(*columns, console=console or Console(stderr=True), redirect_stdout=False)
        self._bar = self._progress.add_task("", total=None)

    def fit_start(self, trainer: View) -> None:
        self._progress.update(self._bar, total=trainer.total_steps or None, completed=trainer.step)
        if trainer.step:
            self._progress.console.print(f"resumed at step {trainer.step} of {_total(trainer)}", highlight=False)
        self._progress.start()

    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        self._progress.update(self._bar, completed=record["step"], description=_short(record))

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> None:
        self._progress.console.print(evaluation_line(record), highlight=False)

    def checkpoint_saved(self, trainer: View, path: Path) -> None:
        self._progress.update(self._bar, completed=trainer.step)

    def stop_requested(self, trainer: View, reason: str) -> None:
        self._progress.console.print(f"stopping at step {trainer.step} ({reason}); saving", highlight=False)

    def fit_end(self, trainer: View) -> None:
        self._progress.update(self._bar, completed=trainer.step)
        self._progress.stop()

    def close(self) -> None:
        self._progress.stop()


def progress(kind: str) -> list[Hook]:
    """The hook for ``auto``, ``rich``, ``plain`` or ``off``."""
    if kind == "off":
        return []
    live = kind == "rich" or (kind == "auto" and sys.stderr.isatty())
    return [RichProgress() if live else PlainProgress()]


def _total(trainer: View) -> str:
    return str(trainer.total_steps or "?")


def _short(record: dict[str, Any]) -> str:
    """What fits a line of 80 columns."""
    return f"loss {record['loss']:.4g}  {record['samples_per_second']:,.0f}/s  waiting {record['data_wait']:.0%}"
